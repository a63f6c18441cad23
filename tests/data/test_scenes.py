"""Floors on the difficulty of `clips`: what a scene may be, and what cannot be read without the frames' order.

For every question on order, time, direction and speed, and every other answer to it, `twin` builds a scene that the
generator draws equally often, where that answer is right and the multiset of frames is the same. A model that sees
shuffled frames thus sees the same input for all four answers, and a frame drawn uniformly (without its time) has the
same distribution for all four: neither can beat chance.
"""

import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from videonsa_jax.data import scenes
from videonsa_jax.data.clips import clips_long
from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.questions import (
    COUNT_NAMES,
    DIRECTIONS,
    FAMILIES,
    QUARTER_NAMES,
    Clip,
    Question,
    draw_clips,
)
from videonsa_jax.data.scenes import Ball, Box, Card, Edge, Needle, Scene, Still

ORDERED = ("time", "order", "direction", "speed")


@pytest.fixture(scope="module")
def heldout() -> list[Clip]:
    return draw_clips(ClipsConfig(), "heldout")


@pytest.fixture(scope="module")
def train() -> list[Clip]:
    return draw_clips(ClipsConfig(), "train")


@pytest.fixture(scope="module")
def varied() -> list[Clip]:
    return draw_clips(ClipsConfig(heldout_clips=30, seconds=(4, 8, 12, 24), frame_side=72, seed=5), "heldout")


def of(scene: Scene, kind: type) -> list:
    return [thing for thing in scene.things if isinstance(thing, kind)]


def shown(scene: Scene, **look: str) -> Needle | Card | Ball | Box | Still:
    """The one thing of a scene with this shape or colour."""
    (thing,) = (
        thing
        for thing in scene.things
        if not isinstance(thing, Edge) and all(getattr(thing, name, None) == value for name, value in look.items())
    )
    return thing


def quarter(scene: Scene, thing: Needle | Card) -> int:
    return thing.onset * 4 // scene.slots


def answer(scene: Scene, question: Question) -> str:
    """What the scene says, found without the generator's bookkeeping."""
    words = re.findall(r"\w+", question.text)
    if question.family == "colour":
        return shown(scene, shape=words[-1]).colour
    if question.family == "time":
        return QUARTER_NAMES[quarter(scene, shown(scene, shape=words[-2]))]
    if question.family == "order":
        needles = sorted(of(scene, Needle), key=lambda needle: needle.onset)
        return needles[0 if words[-1] == "first" else -1].shape
    if question.family == "text":
        return next(card.word for card in of(scene, Card) if card.colour == words[3])
    if question.family == "count":
        return COUNT_NAMES[sum(edge.colour == words[-1] for edge in of(scene, Edge)) - 1]
    if question.family == "speed":
        ball = next(ball for ball in of(scene, Ball) if ball.colour == words[4])
        return next(name for name, step in scenes.SPEEDS.items() if step == abs(ball.step))
    if question.family == "direction":
        box = next(box for box in of(scene, Box) if box.colour == words[4])
        horizontal = (box.first == "horizontal") == (words[-1] == "first")
        return DIRECTIONS[(box.horizontal > 0) if horizontal else 2 + (box.vertical > 0)]
    here, there = (shown(scene, shape=shape).quadrant for shape in (words[3], words[-1]))
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
        here, there = (quarter(scene, shown(scene, shape=shape)) for shape in (answer(scene, question), other))
        scene = exchange_quarters(scene, here, there)
        return scene if answer(scene, question) == other else reverse_quarter(scene, here)
    if question.family == "direction":
        if DIRECTIONS.index(answer(scene, question)) // 2 != DIRECTIONS.index(other) // 2:
            scene = exchange_halves(scene)
        end = "first" if question.text.endswith("first?") else "last"
        return scene if answer(scene, question) == other else reverse_half(scene, end)
    factors = (multiply_time(scene, factor) for factor in (3, 5, 7, 9, 11, 13, 15))
    return next(scene for scene in factors if answer(scene, question) == other)


def check_scene(scene: Scene) -> None:
    """What every scene of the generator satisfies, and every twin too."""
    length = scene.slots // 4
    flashes = [thing for thing in scene.things if isinstance(thing, Needle | Card | Edge)]
    for thing in flashes:
        assert thing.onset // length == (thing.onset + thing.slots - 1) // length, "lies within a quarter"
        assert thing.slots <= scene.slots / 8
    for a, b in combinations([thing for thing in flashes if not isinstance(thing, Edge)], 2):
        assert a.quadrant != b.quadrant or a.onset // length != b.onset // length, "together, so apart"
    needles = of(scene, Needle)
    if needles:
        assert sorted(Counter(quarter(scene, needle) for needle in needles).values()) in ([1, 1, 1, 1], [2, 2])
        # In different pairs of frames (a token spans two), and two slots apart within a quarter.
        assert len({needle.onset // 2 for needle in needles}) == 4
        for a, b in combinations(needles, 2):
            assert abs(a.onset - b.onset) >= (2 if quarter(scene, a) == quarter(scene, b) else 1)
        assert len({needle.shape for needle in needles}) == len({needle.colour for needle in needles}) == 4
        assert [card.colour for card in of(scene, Card)] == ["white", "yellow"]
    for colour in scenes.EDGE_COLOURS if needles else ():
        edges = sorted((edge for edge in of(scene, Edge) if edge.colour == colour), key=lambda edge: edge.onset)
        assert len({edge.onset // length for edge in edges}) == len(edges) >= 1
        assert all(1 <= edge.onset % length < length - edge.slots for edge in edges)
        assert all(b.onset - (a.onset + a.slots) >= 2 for a, b in pairwise(edges))
    assert all(abs(ball.step) in (1, 3, 5, 7) for ball in of(scene, Ball))
    assert bool(needles) + (len(of(scene, Ball)) == 2) + (len(of(scene, Box)) == 2) == 1


def test_scenes_keep_the_floors(heldout, varied):
    for clip in [*heldout, *varied]:
        check_scene(clip.scene)
        assert clip.scene.slots % 16 == 0
        assert clip.scene.fps % 4 == clip.scene.width % 2 == clip.scene.height % 2 == 0


def test_needles_have_sixteen_onsets_or_more(train):
    onsets: dict[int, set[int]] = defaultdict(set)
    for clip in train:
        onsets[clip.scene.slots] |= {needle.onset for needle in of(clip.scene, Needle)}
    assert {slots: len(seen) for slots, seen in onsets.items()} == {16: 16, 32: 20}


def test_answers_are_what_the_scene_shows(heldout, varied):
    for clip in [*heldout, *varied]:
        for question in clip.questions:
            assert question.answer == answer(clip.scene, question)
            assert question.answer in question.options
            assert len(set(question.options)) == len(question.options) == 4


def test_distractors_are_of_the_same_kind(heldout):
    for clip in heldout:
        for question in clip.questions:
            things = clip.scene.things
            if question.family in ("colour", "order"):
                present = {
                    getattr(n, "colour" if question.family == "colour" else "shape") for n in of(clip.scene, Needle)
                }
                assert set(question.options) == present
            elif question.family == "text":
                assert {card.word for card in of(clip.scene, Card)} <= set(question.options)
            elif question.family in ("speed", "direction"):
                assert sum(isinstance(thing, Ball | Box) for thing in things) == 2
                assert len({thing.colour for thing in things}) == len(things) == 4


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


def test_company_of_a_needle_does_not_tell_its_order(train):
    """Who shows together survives shuffling; first and last are in company as often as any needle."""
    seen, expected, asked = 0, 0.0, 0
    for clip in train:
        needles = of(clip.scene, Needle)
        company = {a.shape: any(a is not b and abs(a.onset - b.onset) < a.slots for b in needles) for a in needles}
        for question in clip.questions:
            if question.family == "order":
                seen, expected, asked = seen + company[question.answer], expected + sum(company.values()) / 4, asked + 1
    # Within 2.6 standard deviations of a binomial of at most the largest variance, asked / 4.
    assert abs(seen - expected) < 2.6 * (asked / 4) ** 0.5


def test_relative_motion_does_not_tell_the_motion(train):
    """Shuffled frames show how two balls or boxes move relative to one another: no answer is likelier for it."""
    table: dict[tuple[str, int], Counter[str]] = defaultdict(Counter)
    for clip in train:
        balls, boxes = of(clip.scene, Ball), of(clip.scene, Box)
        for question in clip.questions:
            if question.family == "speed":
                table["speed", balls[0].step * pow(balls[1].step, -1, 16) % 16][question.answer] += 1
            elif question.family == "direction" and boxes[0].first == boxes[1].first:
                table["direction", boxes[0].horizontal * boxes[1].horizontal][question.answer] += 1
    assert len(table) == 8 + 2
    # 99.9 % of chi-square with 3 degrees of freedom, over four answers.
    for counts in table.values():
        mean = counts.total() / 4
        assert sum((counts[name] - mean) ** 2 / mean for name in counts) < 16.3


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


@pytest.mark.parametrize("seconds", [4, 64])
def test_every_length_gives_sound_scenes(seconds):
    config = replace(clips_long(seconds), train_clips=20)
    for clip in draw_clips(config, "train"):
        check_scene(clip.scene)
        assert clip.scene.slots == 4 * seconds
        for needle in of(clip.scene, Needle):
            assert needle.slots == {4: 1, 64: 8}[seconds]


def test_painted_needles_fill_their_quadrant_only(varied):
    """About a third of the smaller side, at the quadrant's place, clear of the edge."""
    for clip in varied:
        scene = clip.scene
        for needle in of(scene, Needle):
            picture = scenes.paint(scene, (needle.mark(needle.onset, scene.slots),))
            rows, columns = np.nonzero((picture == scenes.COLOURS[needle.colour]).all(-1))
            side = min(scene.width, scene.height)
            assert 0.25 * side < np.ptp(rows) < 0.4 * side
            assert 0.25 * side < np.ptp(columns) < 0.4 * side
            assert rows.min() >= 4
            assert columns.min() >= 4
            assert {int(row >= scene.height / 2) for row in rows} == {needle.quadrant // 2}
            assert {int(column >= scene.width / 2) for column in columns} == {needle.quadrant % 2}
