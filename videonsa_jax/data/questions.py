"""Clips of the `clips` data set as scenes with questions, drawn so that every answer is as likely as every other.

Answers are dealt from shuffled decks, not drawn: within a split each family's answers, and their places among the
options, are balanced to within one deck.

A training clip also has a description, which names everything that its questions ask about: without it, a small
model learns the same families several times slower.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Literal

import numpy as np

from videonsa_jax.data import scenes
from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.scenes import Axis, Ball, Box, Card, Edge, Needle, Scene, Sign, Still, Thing

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
Family = Literal["colour", "time", "order", "text", "count", "speed", "direction", "spatial"]
FAMILIES: tuple[Family, ...] = ("colour", "time", "order", "text", "count", "speed", "direction", "spatial")

QUARTER_NAMES = ("first", "second", "third", "fourth")
COUNT_NAMES = ("one", "two", "three", "four")
DIRECTIONS = ("left", "right", "up", "down")
RELATIONS = ("left", "right", "above", "below")

_TEXTS: dict[Family, str] = {
    "colour": "What colour is the {shape}?",
    "time": "In which quarter of the clip does the {colour} shape appear?",
    "order": "What colour is the shape that appears {end}?",
    "text": "What does the {colour} card say?",
    "count": "How many times does the edge flash {colour}?",
    "speed": "How fast does the ball circle?",
    "direction": "Which way does the box slide {end}?",
    "spatial": "Where is the {colour} shape relative to the {other} one?",
}

DESCRIBE = "Describe the clip."

# A clip of flashes carries nine questions, one of a ball or a box two or three.
_KINDS = ("flashes", "balls", "boxes")
_SCALES = (0.8, 1.0, 1.25)  # of the frame's side
_FRAME_RATES = (8, 12, 16)
# Longer clips would spend most of their rendering on repeated frames.
_LONG_SECONDS, _LONG_FRAME_RATES = 8, (8, 12)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; the answer is one of the options."""

    family: Family
    text: str
    options: tuple[str, ...]
    answer: str

    @property
    def prompt(self) -> str:
        """The question with its options, one to a line so that an option is written exactly as an answer is."""
        return "\n".join((self.text, "Options:", *self.options))


@dataclass(frozen=True)
class Clip:
    """A scene with what is asked about it.

    Attributes:
      video: path of the video relative to the data set's folder.
      scene: what the video shows.
      questions: multiple-choice questions.
      description: everything that happens, in order.
    """

    video: str
    scene: Scene
    questions: tuple[Question, ...]
    description: str


def _ask(family: Family, **words: str) -> str:
    return _TEXTS[family].format(**words)


def corpus() -> list[str]:
    """Every question the families can ask, with the options it may have: what the tokenizer is trained on."""
    colours, ends = tuple(scenes.COLOURS), ("first", "last")
    asked: list[tuple[str, tuple[str, ...]]] = []
    asked += [(_ask("colour", shape=shape), colours) for shape in scenes.SHAPES]
    asked += [(_ask("time", colour=colour), QUARTER_NAMES) for colour in colours]
    asked += [(_ask("order", end=end), colours) for end in ends]
    asked += [(_ask("text", colour=colour), scenes.WORDS) for colour in scenes.CARD_COLOURS]
    asked += [(_ask("count", colour="orange"), COUNT_NAMES)]
    asked += [(_ask("speed"), tuple(scenes.SPEEDS))]
    asked += [(_ask("direction", end=end), DIRECTIONS) for end in ends]
    asked += [(_ask("spatial", colour=scenes.STILL_COLOURS[0], other=scenes.STILL_COLOURS[1]), RELATIONS)]
    needles = [Needle(shape, colour, 0.0, 0.0, 0, 0) for shape, colour in product(scenes.SHAPES, colours)]
    described = [_describe_flashes([needle]) for needle in needles]
    stills = [Still(scenes.SHAPES[0], colour, 0, 0.0, 0.0) for colour in scenes.STILL_COLOURS]
    described += [_describe_company(stills, relation, Sign(scenes.WORDS[0], "white", 0)) for relation in RELATIONS]
    described += [f"{speed} ball" for speed in scenes.SPEEDS] + [f"{way} {way} box" for way in DIRECTIONS]
    return ["\n".join((text, "Options:", *options)) for text, options in asked] + [DESCRIBE, *described]


def _describe_flashes(events: Sequence[Needle | Card]) -> str:
    in_order = sorted(events, key=lambda event: event.onset)
    return "\n".join(event.word if isinstance(event, Card) else f"{event.colour} {event.shape}" for event in in_order)


def _describe_company(stills: Sequence[Still], relation: str, sign: Sign) -> str:
    here, there = (f"{still.colour} {still.shape}" for still in stills)
    return f"{here} {relation} {there}\n{sign.word}"


class _Dealer:
    """Deals values from named decks: every value once, in random order, before any comes again."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self._decks: dict[str, Iterator] = {}

    def deal[T](self, name: str, values: Sequence[T]) -> T:
        if name not in self._decks:
            self._decks[name] = self._deck(values)
        return next(self._decks[name])

    def _deck[T](self, values: Sequence[T]) -> Iterator[T]:
        while True:
            for index in self.rng.permutation(len(values)):
                yield values[index]

    def pick[T](self, values: Sequence[T], count: int) -> list[T]:
        """`count` different values in random order."""
        return [values[index] for index in self.rng.permutation(len(values))[:count]]

    def question(self, family: Family, text: str, answer: str, others: Sequence[str]) -> Question:
        """A question whose answer has a dealt place among the options."""
        options = self.pick([other for other in others if other != answer], 3)
        options.insert(self.deal(f"{family} place", [0, 1, 2, 3]), answer)
        return Question(family, text, tuple(options), answer)

    def place(self) -> tuple[float, float]:
        x, y = self.rng.uniform(-1, 1, 2)
        return float(x), float(y)


def _needle_ranks(dealer: _Dealer) -> tuple[list[int], tuple[int, int]]:
    """The quarter of each of four needles in order of appearance, and the two that the time questions ask about."""
    asked = dealer.deal("time", list(product(range(scenes.QUARTERS), repeat=2)))
    if asked[0] != asked[1] and dealer.rng.integers(2):
        return list(range(scenes.QUARTERS)), asked
    if asked[0] == asked[1]:
        quarters = sorted((asked[0], dealer.pick([q for q in range(scenes.QUARTERS) if q != asked[0]], 1)[0]))
        ranks = dealer.pick([2 * quarters.index(asked[0]), 2 * quarters.index(asked[0]) + 1], 2)
    else:
        quarters = sorted(asked)
        ranks = [2 * quarters.index(quarter) + int(dealer.rng.integers(2)) for quarter in asked]
    return [quarters[0]] * 2 + [quarters[1]] * 2, (ranks[0], ranks[1])


def _take_places(dealer: _Dealer, free: set[int], quarter: int, count: int, places: int) -> list[int]:
    """`count` free places of a quarter, ascending, no longer free."""
    of_quarter = [place for place in sorted(free) if place // (places // scenes.QUARTERS) == quarter]
    taken = sorted(dealer.pick(of_quarter, count))
    free.difference_update(taken)
    return taken


def _edges(dealer: _Dealer, count: int, slots: int) -> list[Edge]:
    """`count` orange flashes and one to four cyan ones: two of a colour in different quarters, never two at once."""
    length, quarter_slots = scenes.event_slots(slots), slots // scenes.QUARTERS
    onsets = range(1, quarter_slots - length)
    quarters = list(range(scenes.QUARTERS))
    flashes = {"orange": dealer.pick(quarters, count), "cyan": dealer.pick(quarters, int(dealer.rng.integers(1, 5)))}
    edges: list[Edge] = []
    for quarter in quarters:
        colours = [colour for colour, chosen in flashes.items() if quarter in chosen]
        apart = [pair for pair in product(onsets, repeat=2) if abs(pair[0] - pair[1]) >= length]
        chosen = apart[dealer.rng.integers(len(apart))] if len(colours) == 2 else [int(dealer.rng.choice(onsets))]
        edges += [
            Edge(colour, quarter * quarter_slots + onset, length)
            for colour, onset in zip(colours, chosen, strict=False)
        ]
    return edges


def _flashes(dealer: _Dealer, slots: int) -> tuple[list[Thing], list[Question], str]:
    length, places = scenes.event_slots(slots), scenes.needle_places(slots)
    quarters, timed = _needle_ranks(dealer)
    free = set(range(places))
    needle_places = [
        place
        for quarter in sorted(set(quarters))
        for place in _take_places(dealer, free, quarter, quarters.count(quarter), places)
    ]
    card_places = dealer.pick(sorted(free), 2)

    colours = dealer.deal("colours", list(permutations(scenes.COLOURS, 4)))
    shapes = dealer.pick(scenes.SHAPES, 4)
    words = dealer.deal("text", list(permutations(scenes.WORDS, 2)))
    needles = [
        Needle(shape, colour, *dealer.place(), place * length, length)
        for shape, colour, place in zip(shapes, colours, needle_places, strict=True)
    ]
    cards = [
        Card(word, colour, *dealer.place(), place * length, length)
        for word, colour, place in zip(words, scenes.CARD_COLOURS, card_places, strict=True)
    ]
    count = dealer.deal("count", [1, 2, 3, 4])
    edges = _edges(dealer, count, slots)

    other_words = dealer.pick([word for word in scenes.WORDS if word not in words], 2)
    questions = [
        *(
            dealer.question("colour", _ask("colour", shape=shapes[rank]), colours[rank], colours)
            for rank in dealer.pick(range(4), 2)
        ),
        *(
            dealer.question("time", _ask("time", colour=colours[rank]), QUARTER_NAMES[quarters[rank]], QUARTER_NAMES)
            for rank in timed
        ),
        dealer.question("order", _ask("order", end="first"), colours[0], colours),
        dealer.question("order", _ask("order", end="last"), colours[-1], colours),
        dealer.question("text", _ask("text", colour="white"), words[0], [words[1], *other_words]),
        dealer.question("text", _ask("text", colour="yellow"), words[1], [words[0], *other_words]),
        dealer.question("count", _ask("count", colour="orange"), COUNT_NAMES[count - 1], COUNT_NAMES),
    ]
    return [*needles, *cards, *edges], questions, _describe_flashes([*needles, *cards])


@dataclass(frozen=True)
class _Company:
    """What stands beside a mover: two shapes side by side or one above the other, a sign, and what is said of them."""

    things: tuple[Still | Sign, ...]
    question: Question
    description: str
    free_quadrant: int


def _company(dealer: _Dealer) -> _Company:
    relation = dealer.deal("spatial", RELATIONS)
    if relation in ("left", "right"):
        quadrants = [(0, 1), (2, 3)][dealer.rng.integers(2)]
    else:
        quadrants = [(0, 2), (1, 3)][dealer.rng.integers(2)]
    if relation in ("right", "below"):
        quadrants = quadrants[::-1]
    shapes = dealer.pick(scenes.SHAPES, 2)
    stills = [
        Still(shape, colour, quadrant, *dealer.place())
        for shape, colour, quadrant in zip(shapes, scenes.STILL_COLOURS, quadrants, strict=True)
    ]
    text = _ask("spatial", colour=scenes.STILL_COLOURS[0], other=scenes.STILL_COLOURS[1])
    question = dealer.question("spatial", text, relation, RELATIONS)
    others = [quadrant for quadrant in range(len(scenes.QUADRANTS)) if quadrant not in quadrants]
    for_sign, free = dealer.pick(others, 2)
    sign = Sign(dealer.deal("sign", scenes.WORDS), dealer.pick(list(scenes.CARD_COLOURS), 1)[0], for_sign)
    return _Company((*stills, sign), question, _describe_company(stills, relation, sign), free)


def _balls(dealer: _Dealer, _slots: int) -> tuple[list[Thing], list[Question], str]:
    company = _company(dealer)
    speed = dealer.deal("speed", list(scenes.SPEEDS))
    phase, sense = int(dealer.rng.integers(scenes.RING_STEPS)), int(dealer.rng.choice((-1, 1)))
    ball = Ball(company.free_quadrant, phase, sense * scenes.SPEEDS[speed])
    questions = [dealer.question("speed", _ask("speed"), speed, tuple(scenes.SPEEDS)), company.question]
    return [ball, *company.things], questions, f"{speed} ball\n{company.description}"


def _boxes(dealer: _Dealer, _slots: int) -> tuple[list[Thing], list[Question], str]:
    company = _company(dealer)
    axes: tuple[Axis, ...] = ("horizontal", "vertical")
    first, horizontal, vertical = dealer.deal("direction", list(product(axes, (-1, 1), (-1, 1))))
    # A row or column in which the box lies whole.
    lanes = dealer.rng.integers(scenes.TRACK_STEPS - scenes.BOX_STEPS + 1, size=2).tolist()
    starts = dealer.rng.integers(scenes.TRACK_STEPS, size=2).tolist()
    box = Box(company.free_quadrant, first, horizontal, vertical, *lanes, *starts)
    ways = ["left" if horizontal < 0 else "right", "up" if vertical < 0 else "down"]
    ways = ways if first == "horizontal" else ways[::-1]
    asked = [
        dealer.question("direction", _ask("direction", end=end), way, DIRECTIONS)
        for end, way in zip(("first", "last"), ways, strict=True)
    ]
    return [box, *company.things], [*asked, company.question], f"{' '.join(ways)} box\n{company.description}"


def aspect_ratio(aspect: str) -> float:
    """The ratio that "width:height" states; a ValueError where it states none between 1:4 and 4:1."""
    width, _, height = aspect.partition(":")
    if not (width.isdecimal() and height.isdecimal() and int(height) > 0):
        raise ValueError(aspect)
    ratio = int(width) / int(height)
    if not 0.25 <= ratio <= 4:
        raise ValueError(aspect)
    return ratio


def _size(side: float, ratio: float) -> tuple[int, int]:
    """Even width and height of about side^2 pixels (4:2:0 chroma wants even sizes)."""
    return 2 * round(side * ratio**0.5 / 2), 2 * round(side / ratio**0.5 / 2)


def draw_clips(config: ClipsConfig, split: Split) -> list[Clip]:
    """The clips of a split: a pure function of the configuration."""
    dealer = _Dealer(np.random.default_rng((config.seed, SPLITS.index(split))))
    make = {"flashes": _flashes, "balls": _balls, "boxes": _boxes}
    lengths = config.seconds + (config.short_seconds if split == "train" else ())
    clips: list[Clip] = []
    for index in range(config.train_clips if split == "train" else config.heldout_clips):
        seconds = dealer.deal("seconds", lengths)
        rates = _FRAME_RATES if seconds <= _LONG_SECONDS else _LONG_FRAME_RATES
        slots = seconds * scenes.SLOTS_PER_SECOND
        things, questions, description = make[_KINDS[index % len(_KINDS)]](dealer, slots)
        side = config.frame_side * dealer.deal("scale", _SCALES)
        width, height = _size(side, aspect_ratio(dealer.deal("aspect", config.aspects)))
        grey = int(dealer.rng.integers(10, 50))
        tint = dealer.rng.integers(0, 16, 3).tolist()
        scene = Scene(
            width=width,
            height=height,
            fps=int(dealer.rng.choice(rates)),
            slots=slots,
            background=(grey + tint[0], grey + tint[1], grey + tint[2]),
            things=tuple(things),
        )
        clips.append(Clip(f"{split}/{index:06d}.mp4", scene, tuple(questions), description))
    return clips
