"""Scenes of the `clips` data set: what stands where in every slot, and how a slot is painted.

Time is counted in slots of a quarter of a second, one per frame sampled at 4 fps. A scene changes at slot boundaries
only, so that every rule that takes one frame from each slot, whatever the file's frame rate, sees the same frames.

Each kind of scene has moves that reorder a clip's slots and yield another scene of the same kind, equally likely but
with another answer. Nothing can then be read from the frames without their order:

- flashes (needles, cards, edges): every thing lies within a quarter of the clip; needles and cards have the frame to
  themselves. Moves: permute the quarters, reverse the slots of a quarter.
- balls: a ball steps by an odd number of sixteenths of its ring. Move: multiply time by an odd number modulo 16, which
  multiplies the ball's step by it.
- boxes: a box slides along one axis for half of the clip and along the other for the rest, with a period of 8 slots.
  Moves: exchange the halves, reverse a half.

A ball and a box never share a clip: with both, the joint frames would tell the ball's speed up to one bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

SLOTS_PER_SECOND = 4
RING_STEPS = 16
TRACK_STEPS = 8
BOX_STEPS = 3
QUARTERS = 4

Rgb = tuple[int, int, int]
Axis = Literal["horizontal", "vertical"]

COLOURS: dict[str, Rgb] = {
    "red": (235, 35, 35),
    "green": (25, 190, 45),
    "blue": (45, 85, 255),
    "purple": (180, 50, 225),
    "pink": (255, 130, 190),
    "brown": (140, 80, 30),
}
CARD_COLOURS: dict[str, Rgb] = {"white": (255, 255, 255), "yellow": (255, 225, 30)}
EDGE_COLOURS: dict[str, Rgb] = {"orange": (255, 135, 0), "cyan": (0, 205, 235)}
# Told apart by where they are bright, at any size: finer shapes took a small model longer than all else together.
SHAPES = ("disc", "ring", "bar", "pillar")
# The two still shapes that spatial questions ask about.
STILL_COLOURS = ("red", "blue")
MOVER: Rgb = (255, 255, 255)
WORDS = ("CAT", "DOG", "SUN", "MAP", "KEY", "JET", "FOX", "OWL")
# Odd numbers of sixteenths of a turn per slot: coprime with the ring, so that every speed visits the same places.
SPEEDS = {"slow": 1, "medium": 3, "fast": 5, "racing": 7}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
WHOLE = len(QUADRANTS)  # beside the quadrants' numbers: the whole frame

_BLACK = (0, 0, 0)
_PANEL = (80, 80, 80)


class Mark(NamedTuple):
    """What a thing shows in one slot; `x` and `y` mean what the painter of `look` says."""

    look: str
    colour: Rgb
    quadrant: int = 0
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Needle:
    """A shape shown once, alone in the frame; `x`, `y` in [-1, 1] place it in the free room."""

    shape: str
    colour: str
    x: float
    y: float
    onset: int
    slots: int

    def mark(self, slot: int, slots: int) -> Mark | None:
        """What shows in `slot` of a clip of `slots`."""
        mark = Mark(self.shape, COLOURS[self.colour], WHOLE, self.x, self.y)
        return mark if _shows(self, slot) else None


@dataclass(frozen=True)
class Card:
    """A word on a coloured card, shown once; placed like a needle."""

    word: str
    colour: str
    x: float
    y: float
    onset: int
    slots: int

    def mark(self, slot: int, slots: int) -> Mark | None:
        """What shows in `slot` of a clip of `slots`."""
        mark = Mark(self.word, CARD_COLOURS[self.colour], WHOLE, self.x, self.y)
        return mark if _shows(self, slot) else None


@dataclass(frozen=True)
class Edge:
    """One flash of the frame's edge."""

    colour: str
    onset: int
    slots: int

    def mark(self, slot: int, slots: int) -> Mark | None:
        """What shows in `slot` of a clip of `slots`."""
        return Mark("edge", EDGE_COLOURS[self.colour]) if _shows(self, slot) else None


def _shows(event: Needle | Card | Edge, slot: int) -> bool:
    return event.onset <= slot < event.onset + event.slots


@dataclass(frozen=True)
class Ball:
    """A white ball on a ring: at `phase + step * slot` sixteenths of a turn."""

    quadrant: int
    phase: int
    step: int

    def mark(self, slot: int, slots: int) -> Mark:
        """What shows in `slot` of a clip of `slots`; x is the place on the ring."""
        return Mark("ball", MOVER, self.quadrant, (self.phase + self.step * slot) % RING_STEPS)


@dataclass(frozen=True)
class Box:
    """A white box that slides along one axis for half of the clip, then along the other; it wraps round its panel.

    Attributes:
      first: the axis of the first half.
      horizontal: +1 slides right, -1 left.
      vertical: +1 slides down, -1 up.
      row: the row it slides along horizontally, in eighths of the panel; `column` likewise.
      start_x: its column in the first slot of the horizontal half; `start_y` likewise.
    """

    quadrant: int
    first: Axis
    horizontal: int
    vertical: int
    row: int
    column: int
    start_x: int
    start_y: int

    def mark(self, slot: int, slots: int) -> Mark:
        """What shows in `slot` of a clip of `slots`; x and y in eighths of the panel."""
        half, step = divmod(slot, slots // 2)
        if (self.first == "horizontal") == (half == 0):
            x, y = (self.start_x + self.horizontal * step) % TRACK_STEPS, self.row
        else:
            x, y = self.column, (self.start_y + self.vertical * step) % TRACK_STEPS
        return Mark("box", MOVER, self.quadrant, x, y)


@dataclass(frozen=True)
class Still:
    """A shape that stays where it is; placed like a needle."""

    shape: str
    colour: str
    quadrant: int
    x: float
    y: float

    def mark(self, slot: int, slots: int) -> Mark:
        """What shows in `slot` of a clip of `slots`."""
        return Mark(self.shape, COLOURS[self.colour], self.quadrant, self.x, self.y)


@dataclass(frozen=True)
class Sign:
    """A word on a coloured card that stays where it is and fills its quadrant."""

    word: str
    colour: str
    quadrant: int

    def mark(self, slot: int, slots: int) -> Mark:
        """What shows in `slot` of a clip of `slots`."""
        return Mark(self.word, CARD_COLOURS[self.colour], self.quadrant)


Thing = Needle | Card | Edge | Ball | Box | Still | Sign


@dataclass(frozen=True)
class Scene:
    """A clip before it is rendered.

    Attributes:
      width: pixels, even; `height` likewise.
      fps: frame rate of the file, a multiple of 4.
      slots: length in quarter seconds, a multiple of 16.
    """

    width: int
    height: int
    fps: int
    slots: int
    background: Rgb
    things: tuple[Thing, ...]

    @property
    def frames_per_slot(self) -> int:
        """Frames of the file in a slot."""
        return self.fps // SLOTS_PER_SECOND

    def marks(self, slot: int) -> tuple[Mark, ...]:
        """What shows in a slot, the same for slots that look the same."""
        marks = (thing.mark(slot, self.slots) for thing in self.things)
        return tuple(mark for mark in marks if mark is not None)


def event_slots(slots: int) -> int:
    """Slots a needle, a card or a flash of the edge lasts in a clip of `slots`: at most a sixteenth, at most 6 s.

    Needles and cards are whole pairs of frames and fill a quarter without rest, so that a quarter's places reversed
    are the same places.
    """
    return max(length for length in range(2, 25, 2) if length <= slots // 16 and slots // QUARTERS % length == 0)


def needle_places(slots: int) -> int:
    """Onsets a needle or card can have in a clip of `slots`; a quarter of them lie in each quarter of the clip."""
    return slots // event_slots(slots)


def _margin(width: int, height: int) -> int:
    return max(4, round(0.06 * min(width, height)))


def _region(image: Image.Image, quadrant: int) -> tuple[float, float, float, float]:
    """Centre x, centre y, width, height of a quadrant of the area within the edge, or of all of that area."""
    margin = _margin(*image.size)
    width, height = float(image.width - 2 * margin), float(image.height - 2 * margin)
    if quadrant == WHOLE:
        return image.width / 2, image.height / 2, width, height
    return margin + width * (quadrant % 2 + 0.5) / 2, margin + height * (quadrant // 2 + 0.5) / 2, width / 2, height / 2


# Corners in units of the shape's half side.
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "bar": [(-1.0, -0.35), (1.0, -0.35), (1.0, 0.35), (-1.0, 0.35)],
    "pillar": [(-0.35, -1.0), (0.35, -1.0), (0.35, 1.0), (-0.35, 1.0)],
}


def _paint_shape(image: Image.Image, mark: Mark) -> None:
    centre_x, centre_y, width, height = _region(image, mark.quadrant)
    half = 0.38 * min(width, height)
    x = round(centre_x + mark.x * 0.8 * (width / 2 - half))
    y = round(centre_y + mark.y * 0.8 * (height / 2 - half))
    draw = ImageDraw.Draw(image)
    if mark.look in _CORNERS:
        draw.polygon([(x + half * dx, y + half * dy) for dx, dy in _CORNERS[mark.look]], fill=mark.colour)
    elif mark.look == "disc":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=mark.colour)
    else:
        draw.ellipse((x - half, y - half, x + half, y + half), outline=mark.colour, width=round(0.45 * half))


def _paint_card(image: Image.Image, mark: Mark) -> None:
    centre_x, centre_y, width, height = _region(image, mark.quadrant)
    card_width = min(0.96 * width, 1.5 * height)
    card_height = min(0.9 * height, 0.55 * card_width)
    x = round(centre_x + mark.x * 0.8 * (width - card_width) / 2)
    y = round(centre_y + mark.y * 0.8 * (height - card_height) / 2)
    draw = ImageDraw.Draw(image)
    card = (x - card_width / 2, y - card_height / 2, x + card_width / 2, y + card_height / 2)
    draw.rectangle(card, fill=mark.colour)
    # Three capitals are about 2.1 font sizes wide.
    font = ImageFont.load_default(min(0.92 * card_width / 2.1, 1.2 * card_height))
    draw.text((x, y), mark.look, fill=_BLACK, font=font, anchor="mm", stroke_width=card_width / 120)


def _paint_edge(image: Image.Image, mark: Mark) -> None:
    corner = (0, 0, image.width - 1, image.height - 1)
    ImageDraw.Draw(image).rectangle(corner, outline=mark.colour, width=_margin(*image.size) - 1)


def _paint_ball(image: Image.Image, mark: Mark) -> None:
    centre_x, centre_y, width, height = _region(image, mark.quadrant)
    ring, ball = 0.34 * min(width, height), 0.16 * min(width, height)
    draw = ImageDraw.Draw(image)
    draw.ellipse((centre_x - ring, centre_y - ring, centre_x + ring, centre_y + ring), outline=_PANEL)
    angle = 2 * math.pi * mark.x / RING_STEPS
    x, y = round(centre_x + ring * math.cos(angle)), round(centre_y + ring * math.sin(angle))
    draw.ellipse((x - ball, y - ball, x + ball, y + ball), fill=mark.colour)


def _paint_box(image: Image.Image, mark: Mark) -> None:
    centre_x, centre_y, width, height = _region(image, mark.quadrant)
    panel = round(0.9 * min(width, height))
    box = round(BOX_STEPS / TRACK_STEPS * panel)
    x, y = (round(place * panel / TRACK_STEPS) for place in (mark.x, mark.y))
    pixels = np.full((panel, panel, 3), _PANEL, np.uint8)
    rows, columns = (np.arange(start, start + box) % panel for start in (y, x))
    pixels[rows[:, None], columns] = mark.colour
    image.paste(Image.fromarray(pixels), (round(centre_x - panel / 2), round(centre_y - panel / 2)))


_PAINTERS: dict[str, Callable[[Image.Image, Mark], None]] = {
    **dict.fromkeys(SHAPES, _paint_shape),
    **dict.fromkeys(WORDS, _paint_card),
    "edge": _paint_edge,
    "ball": _paint_ball,
    "box": _paint_box,
}


def paint(scene: Scene, marks: tuple[Mark, ...]) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of a slot."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    for mark in marks:
        _PAINTERS[mark.look](image, mark)
    return np.asarray(image)
