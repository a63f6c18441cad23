"""Floors on the difficulty of `clips`: what a scene may be, and what cannot be read without the frames' order.

For every question on order, time, direction and speed, and every other answer to it, `twin` builds a scene that the
generator draws equally often, where that answer is right and the multiset of frames is the same. A model that sees
shuffled frames thus sees the same input for all four answers, and a frame drawn uniformly (without its time) has the
same distribution for all four: neither can beat chance.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from videonsa_jax.data import scenes
from videonsa_jax.data.clips import clips_long
from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.questions import (
    COUNT_NAMES,
    DIRECTIONS,
    FAMILIES,
    QUARTER_NAMES,
    RELATIONS,
    Clip,
    Question,
    draw_clips,
)
from videonsa_jax.data.scenes import Ball, Box, Card, Edge, Needle, Scene, Sign, Still

ORDERED = ("time", "order", "direction", "speed")


@pytest.fixture(scope="module")
def heldout() -> list[Clip]:
    return draw_clips(ClipsConfig(), "heldout")


@pytest.fixture(scope="module")
def train() -> list[Clip]:
    return draw_clips(ClipsConfig(), "train")


@pytest.fixture(scope="module")
def varied() -> list[Clip]:
    return draw_clips(ClipsConfig(heldout_clips=30, seconds=(8, 12, 24, 28), frame_side=72, seed=5), "heldout")


def of(scene: Scene, kind: type) -> list:
    return [thing for thing in scene.things if isinstance(thing, kind)]


def shown(scene: Scene, **look: str) -> Needle | Card | Ball | Box | Still | Sign:
    """The one thing of a scene with this shape or colour."""
    (thing,) = (
        thing
        for thing in scene.things
        if not isinstance(thing, Edge) and all(getattr(thing, name, None) == value for name, value in look.items())
    )
    return thing


def lasting(thing: Needle | Card | Edge) -> set[int]:
    return set(range(thing.onset, thing.onset + thing.slots))


def edge_slots(scene: Scene, colour: str) -> set[int]:
    return set().union(*(lasting(edge) for edge in of(scene, Edge) if edge.colour == colour))


def quarter(scene: Scene, thing: Needle | Card) -> int:
    return thing.onset * 4 // scene.slots


def answer(scene: Scene, question: Question) -> str:
    """What the scene says, found without the generator's bookkeeping."""
    words = re.findall(r"\w+", question.text)
    if question.family == "colour":
        return shown(scene, shape=words[-1]).colour
    if question.family == "time":
        return QUARTER_NAMES[quarter(scene, shown(scene, colour=words[-3]))]
    if question.family == "order":
        needles = sorted(of(scene, Needle), key=lambda needle: needle.onset)
        return needles[0 if words[-1] == "first" else -1].colour
    if question.family == "text":
        return next(card.word for card in of(scene, Card) if card.colour == words[3])
    if question.family == "count":
        return COUNT_NAMES[sum(edge.colour == words[-1] for edge in of(scene, Edge)) - 1]
    if question.family == "speed":
        (ball,) = of(scene, Ball)
        return next(name for name, step in scenes.SPEEDS.items() if step == abs(ball.step))
    if question.family == "direction":
        (box,) = of(scene, Box)
        horizontal = (box.first == "horizontal") == (words[-1] == "first")
        return DIRECTIONS[(box.horizontal > 0) if horizontal else 2 + (box.vertical > 0)]
    here, there = (shown(scene, colour=colour).quadrant for colour in (words[3], words[-2]))
    if here // 2 == there // 2:
        return "left" if here < there else "right"
    return "above" if here < there else "below"


def slot_frames(scene: Scene) -> Counter[bytes]:
    return Counter(scenes.paint(scene, scene.marks(slot)).tobytes() for slot in range(scene.slots))


def exchange_quarters(scene: Scene, a: int, b: int) -> Scene:
    swap = {a: b, b: a}
    length = scene.slots // 4
    return replace(
        scene,
        things=tuple(
            replace(thing, onset=thing.onset + (swap.get(q := thing.onset // length, q) - q) * length)
            for thing in scene.things
        ),
    )


def reverse_quarter(scene: Scene, which: int) -> Scene:
    length = scene.slots // 4
    return replace(
        scene,
        things=tuple(
            replace(thing, onset=(2 * which + 1) * length - thing.onset - thing.slots)
            if thing.onset // length == which
            else thing
            for thing in scene.things
        ),
    )


def exchange_halves(scene: Scene) -> Scene:
    other = {"horizontal": "vertical", "vertical": "horizontal"}
    things = (replace(thing, first=other[thing.first]) if isinstance(thing, Box) else thing for thing in scene.things)
    return replace(scene, things=tuple(things))


def reverse_half(scene: Scene, end: str) -> Scene:
    last = scene.slots // 2 - 1

    def reverse(box: Box) -> Box:
        if (box.first == "horizontal") == (end == "first"):
            return replace(box, horizontal=-box.horizontal, start_x=(box.start_x + last * box.horizontal) % 8)
        return replace(box, vertical=-box.vertical, start_y=(box.start_y + last * box.vertical) % 8)

    return replace(scene, things=tuple(reverse(t) if isinstance(t, Box) else t for t in scene.things))


def multiply_time(scene: Scene, factor: int) -> Scene:
    things = (
        replace(thing, step=(thing.step * factor + 8) % 16 - 8) if isinstance(thing, Ball) else thing
        for thing in scene.things
    )
    return replace(scene, things=tuple(things))


def twin(scene: Scene, question: Question, other: str) -> Scene:
    """The scene with the same frames in another order where `other` is the answer."""
    if question.family == "time":
        return exchange_quarters(scene, QUARTER_NAMES.index(answer(scene, question)), QUARTER_NAMES.index(other))
    if question.family == "order":
        here, there = (quarter(scene, shown(scene, colour=colour)) for colour in (answer(scene, question), other))
        scene = exchange_quarters(scene, here, there)
        return scene if answer(scene, question) == other else reverse_quarter(scene, here)
    if question.family == "direction":
        if DIRECTIONS.index(answer(scene, question)) // 2 != DIRECTIONS.index(other) // 2:
            scene = exchange_halves(scene)
        end = "first" if question.text.endswith("first?") else "last"
        return scene if answer(scene, question) == other else reverse_half(scene, end)
    factors = (multiply_time(scene, factor) for factor in (3, 5, 7, 9, 11, 13, 15))
    return next(scene for scene in factors if answer(scene, question) == other)


def check_flashes(scene: Scene) -> None:
    length = scene.slots // 4
    for thing in scene.things:
        assert thing.onset // length == (thing.onset + thing.slots - 1) // length, "lies within a quarter"
        assert thing.slots <= scene.slots / 16
    needles, cards = of(scene, Needle), of(scene, Card)
    assert sorted(Counter(quarter(scene, needle) for needle in needles).values()) in ([1, 1, 1, 1], [2, 2])
    assert len({needle.shape for needle in needles}) == len({needle.colour for needle in needles}) == 4
    assert [card.colour for card in cards] == ["white", "yellow"]
    assert len({card.word for card in cards}) == 2
    assert {thing.onset % thing.slots for thing in (*needles, *cards)} == {0}
    # Whole tokens: one spans two frames.
    assert {thing.slots for thing in (*needles, *cards)} == {scenes.event_slots(scene.slots)} <= set(range(2, 17, 2))
    for slot in range(scene.slots):
        looks = [mark.look for mark in scene.marks(slot)]
        assert looks.count("edge") <= 1
        assert len(looks) - looks.count("edge") <= 1, "a needle or card shows with nothing but an edge"
    for colour in scenes.EDGE_COLOURS:
        edges = sorted((edge for edge in of(scene, Edge) if edge.colour == colour), key=lambda edge: edge.onset)
        assert len({edge.onset // length for edge in edges}) == len(edges) >= 1
        assert all(1 <= edge.onset % length < length - edge.slots for edge in edges)
        assert all(b.onset - (a.onset + a.slots) >= 2 for a, b in pairwise(edges))


def check_scene(scene: Scene) -> None:
    """What every scene of the generator satisfies, and every twin too."""
    kinds = Counter(type(thing) for thing in scene.things)
    if kinds[Needle]:
        assert (kinds.pop(Needle), kinds.pop(Card)) == (4, 2)
        assert set(kinds) == {Edge}
        return check_flashes(scene)
    assert kinds in (Counter({Ball: 1, Still: 2, Sign: 1}), Counter({Box: 1, Still: 2, Sign: 1}))
    assert [still.colour for still in of(scene, Still)] == ["red", "blue"]
    assert len({thing.quadrant for thing in scene.things}) == 4
    assert len({still.shape for still in of(scene, Still)}) == 2
    assert all(abs(ball.step) in (1, 3, 5, 7) for ball in of(scene, Ball))
    for box in of(scene, Box):
        assert 0 <= min(box.row, box.column) <= max(box.row, box.column) <= 5, "its lanes lie whole in the panel"


def test_scenes_keep_the_floors(heldout, varied):
    for clip in [*heldout, *varied]:
        check_scene(clip.scene)
        assert clip.scene.slots % 16 == 0
        assert clip.scene.fps % 4 == clip.scene.width % 2 == clip.scene.height % 2 == 0


def test_kinds_take_turns(heldout):
    kinds = [type(clip.scene.things[0]) for clip in heldout]
    assert kinds == ([Needle, Ball, Box] * len(heldout))[: len(heldout)]


@pytest.mark.parametrize("seconds", [8, 12, 16, 20, 24, 28, 36, 60, 64])
def test_every_length_has_sixteen_onsets_or_more(seconds):
    onsets: set[int] = set()
    for clip in draw_clips(replace(clips_long(seconds), train_clips=300), "train"):
        check_scene(clip.scene)
        assert clip.scene.slots == 4 * seconds
        onsets |= {needle.onset for needle in of(clip.scene, Needle)}
    assert onsets == set(range(0, 4 * seconds, scenes.event_slots(4 * seconds)))
    assert len(onsets) == scenes.needle_places(4 * seconds) >= 16


def test_answers_are_what_the_scene_shows(heldout, varied):
    for clip in [*heldout, *varied]:
        for question in clip.questions:
            assert question.answer == answer(clip.scene, question)
            assert question.answer in question.options
            assert len(set(question.options)) == len(question.options) == 4


def test_descriptions_tell_what_the_scene_shows(heldout):
    for clip in heldout:
        scene = clip.scene
        flashed = sorted((*of(scene, Needle), *of(scene, Card)), key=lambda thing: thing.onset)
        told = [thing.word if isinstance(thing, Card) else f"{thing.colour} {thing.shape}" for thing in flashed]
        answers = {question.family: question.answer for question in clip.questions}
        if not told:
            ways = [question.answer for question in clip.questions if question.family == "direction"]
            mover = f"{' '.join(ways)} box" if ways else f"{answers['speed']} ball"
            red, blue = of(scene, Still)
            (sign,) = of(scene, Sign)
            told = [mover, f"red {red.shape} {answers['spatial']} blue {blue.shape}", sign.word]
        assert clip.description.split("\n") == told


def test_distractors_are_of_the_same_kind(heldout):
    """Other needles, the yellow card, cyan edges; where a clip has one thing to ask about, all that it could do."""
    every = {"time": QUARTER_NAMES, "count": COUNT_NAMES, "speed": scenes.SPEEDS, "direction": DIRECTIONS}
    every |= {"spatial": RELATIONS}
    for clip in heldout:
        for question in clip.questions:
            options = set(question.options)
            if question.family in every:
                assert options == set(every[question.family])
            if question.family in ("colour", "order"):
                assert options == {needle.colour for needle in of(clip.scene, Needle)}
            elif question.family == "text":
                assert {card.word for card in of(clip.scene, Card)} <= options
            elif question.family == "count":
                assert any(edge.colour == "cyan" for edge in of(clip.scene, Edge))


def test_two_hundred_heldout_questions_a_family(heldout):
    counts = Counter(question.family for clip in heldout for question in clip.questions)
    assert set(counts) == set(FAMILIES)
    assert min(counts.values()) >= 200


def test_twins_have_the_same_frames_and_any_other_answer(varied):
    tried = Counter()
    for clip in varied:
        frames = slot_frames(clip.scene)
        for question in clip.questions:
            if question.family not in ORDERED:
                continue
            for other in set(question.options) - {question.answer}:
                scene = twin(clip.scene, question, other)
                check_scene(scene)
                assert answer(scene, question) == other
                assert slot_frames(scene) == frames
                tried[question.family] += 1
    assert min(tried[family] for family in ORDERED) >= 30


@pytest.mark.parametrize("colour", scenes.EDGE_COLOURS)
def test_company_of_a_needle_does_not_tell_its_order(train, colour):
    """What shows together survives shuffling; first and last are under an edge as often as any needle."""
    seen, expected, asked = 0, 0.0, 0
    for clip in train:
        flashed = edge_slots(clip.scene, colour)
        company = {needle.colour: bool(flashed & lasting(needle)) for needle in of(clip.scene, Needle)}
        for question in clip.questions:
            if question.family == "order":
                seen, expected, asked = seen + company[question.answer], expected + sum(company.values()) / 4, asked + 1
    assert 0.1 < expected / asked < 0.9
    # Within 2.6 standard deviations of a binomial of at most the largest variance, asked / 4.
    assert abs(seen - expected) < 2.6 * (asked / 4) ** 0.5


def unordered_features(scene: Scene, question: Question) -> dict[str, object]:
    """Of what one frame or shuffled frames show, what might go with the answer."""
    features: dict[str, object] = {"length": scene.slots, "aspect": scene.width > scene.height, "fps": scene.fps}
    if question.family == "time":
        needle = shown(scene, colour=question.text.split()[-3])
        for colour in scenes.EDGE_COLOURS:
            features[f"{colour} slots"] = len(edge_slots(scene, colour))
            features[f"{colour} company"] = len(edge_slots(scene, colour) & lasting(needle))
        return features | {"shape": needle.shape, "left": needle.x < 0, "cards": of(scene, Card)[0].word}
    red, blue = of(scene, Still)
    features |= {"stills": (red.quadrant, blue.quadrant), "shape": red.shape, "other shape": blue.shape}
    features |= {"word": of(scene, Sign)[0].word, "sign": of(scene, Sign)[0].colour}
    for ball in of(scene, Ball):
        features |= {"quadrant": ball.quadrant, "phase": ball.phase}
    for box in of(scene, Box):
        features |= {"quadrant": box.quadrant, "row": box.row, "column": box.column}
        features |= {"start_x": box.start_x, "start_y": box.start_y}
    if question.family == "spatial":
        del features["stills"]  # which are the answer
    return features


def test_nothing_seen_without_order_goes_with_the_answer(train):
    """The mover's quadrant, its lanes and starts, the stills beside it, an edge over a needle, the clip's length."""
    tables: dict[tuple[str, str, str], Counter] = defaultdict(Counter)
    for clip in train:
        for question in clip.questions:
            if question.family in ("time", "speed", "direction", "spatial"):
                end = question.text.split()[-1] if question.family == "direction" else ""
                for name, value in unordered_features(clip.scene, question).items():
                    tables[question.family, end, name][value, question.answer] += 1
    assert {("speed", "", "quadrant"), ("direction", "first?", "quadrant"), ("spatial", "", "quadrant")} <= set(tables)
    for key, counts in tables.items():
        values, answers = ({cell[axis] for cell in counts} for axis in (0, 1))
        table = np.array([[counts[value, name] for name in sorted(answers)] for value in sorted(values)])
        # There are about 50 tables.
        assert chi2_contingency(table).pvalue > 1e-4, key


def test_short_lengths_are_for_training_alone():
    config = ClipsConfig(train_clips=40, heldout_clips=40, seconds=(16,), short_seconds=(8, 12))
    lengths = {split: {clip.scene.slots // 4 for clip in draw_clips(config, split)} for split in ("train", "heldout")}
    assert lengths == {"train": {8, 12, 16}, "heldout": {16}}


def test_splits_share_no_scene(train, heldout):
    assert not {clip.scene for clip in train} & {clip.scene for clip in heldout}
    assert not {clip.scene.things for clip in train} & {clip.scene.things for clip in heldout}


def test_the_same_seed_draws_the_same_clips(heldout):
    assert draw_clips(ClipsConfig(), "heldout") == heldout
    assert draw_clips(ClipsConfig(seed=1), "heldout") != heldout


def test_answers_and_their_places_are_balanced(heldout):
    answers, places = defaultdict(Counter), defaultdict(Counter)
    for clip in heldout:
        for question in clip.questions:
            answers[question.family][question.answer] += 1
            places[question.family][question.options.index(question.answer)] += 1
    for family in FAMILIES:
        for counts in (answers[family], places[family]):
            # 99.9 % of chi-square with 3, 5 or 7 degrees of freedom.
            bound = {4: 16.3, 6: 20.5, 8: 24.3}[len(counts)]
            mean = counts.total() / len(counts)
            assert sum((count - mean) ** 2 / mean for count in counts.values()) < bound


def score(options: list[str], features: list[list[tuple]], right: Counter, wrong: Counter) -> int:
    return int(np.argmax([sum(np.log((right[f] + 1) / (wrong[f] + 3)) for f in features[i]) for i in range(4)]))


def test_text_alone_stays_at_chance(train, heldout):
    """Naive Bayes on an option's word and place, with the question and with the other options, fitted on train."""

    def features(question: Question) -> list[list[tuple]]:
        return [
            [
                (question.family, place),
                (question.text, word),
                (question.text, place, word),
                *((question.family, word, other) for other in question.options if other != word),
            ]
            for place, word in enumerate(question.options)
        ]

    right, wrong = Counter(), Counter()
    for clip in train:
        for question in clip.questions:
            for word, found in zip(question.options, features(question), strict=True):
                (right if word == question.answer else wrong).update(found)
    hits, asked = Counter(), Counter()
    for clip in heldout:
        for question in clip.questions:
            guess = question.options[score(list(question.options), features(question), right, wrong)]
            hits[question.family] += guess == question.answer
            asked[question.family] += 1
    for family in FAMILIES:
        # The 99 % interval of a binomial at chance.
        assert abs(hits[family] / asked[family] - 0.25) < 2.58 * (0.25 * 0.75 / asked[family]) ** 0.5, family


def test_painted_needles_and_cards_are_large_and_clear_of_the_edge(varied):
    """A needle is about two thirds of the smaller side long; a card fills most of one side."""
    for scene in (clip.scene for clip in varied if of(clip.scene, Needle)):
        side = min(scene.width, scene.height)
        edge = of(scene, Edge)[0]
        frame = scenes.paint(scene, (edge.mark(edge.onset, scene.slots),)) == scenes.EDGE_COLOURS[edge.colour]
        for thing in (*of(scene, Needle), *of(scene, Card)):
            picture = scenes.paint(scene, (thing.mark(thing.onset, scene.slots),))
            painted = (picture == (scenes.COLOURS | scenes.CARD_COLOURS)[thing.colour]).all(-1)
            rows, columns = np.nonzero(painted)
            if isinstance(thing, Needle):
                assert 0.58 * side < max(np.ptp(rows), np.ptp(columns)) < 0.72 * side
                assert 0.2 * side < min(np.ptp(rows), np.ptp(columns))
            else:
                assert max(np.ptp(rows) / scene.height, np.ptp(columns) / scene.width) > 0.7
            assert not (painted & frame.all(-1)).any()
