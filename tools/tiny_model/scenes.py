"""Pictures of coloured shapes on a plain ground, drawn on the fly.

Everything is drawn from a `random.Random`, so a seed names a picture. A scene keeps the truth about itself:
the lessons ask about it, and `labels` says what covers each merged vision token, which is what the vision
tower learns first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from tools.tiny_model.labels import Labels
from tools.tiny_model.names import CELLS, COLORS, SHAPES, Color

# Colour-shape pairs, and shapes at a place, that no training picture shows: evaluation asks for them by name.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"), ("blue", "cross"), ("green", "triangle"), ("yellow", "ring"), ("purple", "square"),
        ("orange", "circle"),
        ("pink", "diamond"), ("black", "heart"),
    }
)  # fmt: skip
HELD_OUT_PLACES = frozenset(
    {
        ("circle", "top right"), ("square", "bottom"), ("triangle", "left"), ("star", "bottom left"),
        ("cross", "top"), ("ring", "bottom right"),
        ("heart", "right"), ("diamond", "top left"),
    }
)  # fmt: skip
SIZES = ((140, 140), (112, 112), (140, 112), (112, 140))  # (width, height) in pixels
SIZE_WEIGHTS = (6, 1.5, 1.5, 1.5)
# least RGB distance of the two colours of a thing: nearer to each other, one name might do for all of it
FADED = 220.0
# radii, as a share of the shorter side; nobody asks about the size of those between
SMALL, LARGE = (0.072, 0.092), (0.132, 0.165)


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str  # "" for a blob that has no name
    color: str  # "" for a colour that has no name, or two colours
    x: float  # centre, 0 to 1 of the width
    y: float
    radius: float  # share of the shorter side
    paint: Color | None = None  # where the colour has no name
    fade: Color | None = None  # what `paint` fades to, from one side of the thing to the other
    seed: int = 0  # of how it is drawn: its turn, its shade

    @property
    def cell(self) -> str:
        return CELLS[min(2, int(self.y * 3)) * 3 + min(2, int(self.x * 3))]

    @property
    def has_clear_place(self) -> bool:
        """Whether it stands well inside its ninth of the picture."""
        return all(abs(value * 3 - border) > 0.2 for value in (self.x, self.y) for border in (1, 2))

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def covers(self, cell: str) -> float:
        """The share of a ninth of a square picture that the box around it covers."""
        row, column = divmod(CELLS.index(cell), 3)
        reach = self.radius * 1.1
        width = min(self.x + reach, (column + 1) / 3) - max(self.x - reach, column / 3)
        height = min(self.y + reach, (row + 1) / 3) - max(self.y - reach, row / 3)
        return max(0.0, width) * max(0.0, height) * 9

    @property
    def size(self) -> str:
        """ "small", "large", or "" where people might disagree."""
        return "small" if self.radius <= SMALL[1] else "large" if self.radius >= LARGE[0] else ""


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    ground: Color
    seed: int

    def has_one(self, like: Thing, what: Literal["color", "shape", "name"]) -> bool:
        """Whether `like` is the only one of its colour, of its shape, or of both."""
        return len([thing for thing in self.things if getattr(thing, what) == getattr(like, what)]) == 1


def is_at_held_out_place(thing: Thing) -> bool:
    return (thing.shape, thing.cell) in HELD_OUT_PLACES


def pick_ground(rng: random.Random) -> Color:
    """White, grey, pastel, or dark."""
    kind = rng.random()
    if kind < 0.3:
        white = rng.randint(244, 255)
        return white, white, white
    if kind < 0.75:
        grey = rng.randint(120, 225)
        return shift((grey, grey, grey), rng, 14)
    if kind < 0.92:
        return rng.randint(175, 255), rng.randint(175, 255), rng.randint(175, 255)
    dark = rng.randint(15, 70)
    return shift((dark, dark, dark), rng, 8)


def colors_on(ground: Color) -> list[str]:
    """The colours that can be told from this ground."""
    return [name for name, color in COLORS.items() if math.dist(color, ground) > 75]


def make_scene(
    rng: random.Random, count: int | None = None, held_out: bool = False, odd: float = 0.0, alike: float = 0.0
) -> Scene:
    """A random scene of `count` things (0 to 9), of up to five where it is left open.

    With `held_out`, its first thing is one of HELD_OUT_PAIRS and the others may stand in HELD_OUT_PLACES;
    without, none does. A share `odd` of the things are blobs, or have a colour without a name, or two
    colours: they teach the tower to see colour and shape apart. A share `alike` of the scenes has things of
    few colours and shapes, so that there are several of each to be counted.
    """
    ground = pick_ground(rng)
    if count is None:
        count = rng.choices(range(6), weights=(1, 5, 6, 5, 4, 4))[0]
        count = max(count, int(held_out))
    on_grid = count > 5 or rng.random() < 0.5
    cells = rng.sample(range(9), count)
    known: Sequence[str] = colors_on(ground)
    new = rng.choice(sorted(pair for pair in HELD_OUT_PAIRS if pair[0] in known))
    shapes: Sequence[str] = SHAPES
    if alike and rng.random() < alike:
        known, shapes = rng.sample(known, rng.randint(2, 4)), rng.sample(SHAPES, rng.randint(2, 4))
    things: list[Thing] = []
    for index, cell in enumerate(cells):
        must = held_out and index == 0
        for _ in range(12):
            if must:
                color, shape = new
            else:
                color, shape = rng.choice(known), rng.choice(shapes)
                if (color, shape) in HELD_OUT_PAIRS:
                    continue
            thing = _place(rng, shape, color, cell if on_grid else None, count)
            if odd and rng.random() < odd:
                thing = _make_odd(rng, thing, ground)
            if not held_out and is_at_held_out_place(thing):
                continue
            if all(_is_apart(thing, other) for other in things):
                things.append(replace(thing, seed=rng.getrandbits(32)))
                break
    return Scene(tuple(things), ground, rng.getrandbits(32))


def _place(rng: random.Random, shape: str, color: str, cell: int | None, count: int) -> Thing:
    if count == 1 and rng.random() < 0.4:  # one large thing, as people tend to draw
        return Thing(shape, color, rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.18, 0.37))
    kind = rng.random()
    radius = (
        rng.uniform(*SMALL)
        if kind < 0.4 or (count > 5 and kind < 0.7)
        else rng.uniform(*(LARGE if kind > 0.6 and count < 6 else (0.093, 0.115)))
    )
    if cell is None:
        edge = radius * 1.2
        return Thing(shape, color, rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge), radius)
    row, column = divmod(cell, 3)
    return Thing(
        shape,
        color,
        (column + 0.5) / 3 + rng.uniform(-0.06, 0.06),
        (row + 0.5) / 3 + rng.uniform(-0.06, 0.06),
        radius,
    )


def _is_apart(thing: Thing, other: Thing) -> bool:
    return math.hypot(thing.x - other.x, thing.y - other.y) > 1.12 * (thing.radius + other.radius) + 0.015


def _make_odd(rng: random.Random, thing: Thing, ground: Color) -> Thing:
    """The same thing without a shape, or in a colour without a name, or in two: as a whole it never looks
    like a pair that is held out.

    Around such a pair's colour a shape has to be shown on all sides: a blue cross was taken for a star while
    crosses had no colour between blue and any other. Of two colours one may be the pair's: a cross is shown
    half blue and half red, so that its edges are known in all colours.
    """
    if rng.random() < 0.4:
        return replace(thing, shape="")
    is_faded = rng.random() < 0.5
    for _ in range(40):
        paint, other = _any_color(rng), _any_color(rng)
        seen = [paint, other] if is_faded else [paint]
        if min(math.dist(color, ground) for color in seen) < 75 or (
            is_faded and math.dist(paint, other) < FADED
        ):
            continue
        mean = [sum(values) / len(seen) for values in zip(*seen, strict=True)]
        if not any((name, thing.shape) in HELD_OUT_PAIRS for name in _names_like(mean)):
            return replace(thing, color="", paint=paint, fade=other if is_faded else None)
    return thing


def _any_color(rng: random.Random) -> Color:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _names_like(color: Sequence[float]) -> list[str]:
    """The names that somebody might give this colour: of all that are near, and of the nearest one unless
    that is far."""
    distances = {name: math.dist(value, color) for name, value in COLORS.items()}
    nearest = min(distances.values())
    return [name for name, distance in distances.items() if distance < 90 or distance == nearest < 130]


def draw(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The scene as an RGB picture of `size` (width, height), drawn at twice the size and reduced.

    A thing looks the same wherever it stands and whatever is beside it; the grain is the scene's.
    """
    width, height = size[0] * 2, size[1] * 2
    image = Image.new("RGB", (width, height), scene.ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        rng = random.Random(thing.seed)
        color = thing.paint or shift(COLORS[thing.color], rng, 16)
        centre, radius = (thing.x * width, thing.y * height), thing.radius * min(width, height)
        if thing.fade is None:
            draw_shape(pen, thing.shape, centre, radius, color, scene.ground, rng)
        else:
            _draw_faded(image, thing.shape, centre, radius, color, thing.fade, rng)
    return add_grain(image.reduce(2), random.Random(scene.seed))


def _draw_faded(
    image: Image.Image,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    color: Color,
    other: Color,
    rng: random.Random,
) -> None:
    """A shape with one colour at one side and another at the other side, in any direction, with a soft or a
    sharp border."""
    reach = math.ceil(radius * 1.3)
    left, top = (int(value) - reach for value in centre)
    x, y = centre[0] - left, centre[1] - top
    side = 2 * reach + 2
    mask = Image.new("RGB", (side, side))
    draw_shape(ImageDraw.Draw(mask), shape, (x, y), radius, (255, 255, 255), (0, 0, 0), rng)
    angle, steepness = rng.uniform(0, 2 * math.pi), rng.choice((0.5, 10.0)) / radius
    columns, rows = np.arange(side) - x, np.arange(side)[:, None] - y
    share = np.clip((columns * math.sin(angle) + rows * math.cos(angle)) * steepness + 0.5, 0, 1)[..., None]
    paint = (share * np.array(other) + (1 - share) * np.array(color)).astype(np.uint8)
    image.paste(Image.fromarray(paint), (left, top), mask.convert("L"))


def add_grain(image: Image.Image, rng: random.Random) -> Image.Image:
    """Often nothing, else a little noise."""
    noise = rng.choice((0, 0, 0, 4, 8))
    if not noise:
        return image
    pixels = np.asarray(image, dtype=np.int16)
    grain = np.random.default_rng(rng.getrandbits(32)).integers(
        -noise, noise + 1, pixels.shape, dtype=np.int16
    )
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def shift(color: Sequence[int], rng: random.Random, most: int) -> Color:
    red, green, blue = (max(0, min(255, c + rng.randint(-most, most))) for c in color)
    return red, green, blue


def draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    color: Color,
    ground: Color,
    rng: random.Random,
) -> None:
    """A named shape, or with "" an irregular blob, turned by a little."""
    x, y = centre
    turn = rng.uniform(-0.2, 0.2)

    def polygon(points: Sequence[tuple[float, float]]) -> None:
        """Points as (angle from the top, share of the radius)."""
        pen.polygon(
            [(x + radius * r * math.sin(a + turn), y - radius * r * math.cos(a + turn)) for a, r in points],
            fill=color,
        )

    match shape:
        case "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        case "ring":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
            hole = radius * rng.uniform(0.5, 0.62)
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
        case "square":
            polygon([(math.pi / 4 + k * math.pi / 2, 1.22) for k in range(4)])
        case "triangle":
            polygon([(k * 2 * math.pi / 3, 1.2) for k in range(3)])
        case "diamond":
            turn *= 0.4  # turned further it would be a square
            polygon([(0, 1.25), (math.pi / 2, 0.85), (math.pi, 1.25), (-math.pi / 2, 0.85)])
        case "star":
            polygon([(k * math.pi / 5, 1.25 if k % 2 == 0 else 0.52) for k in range(10)])
        case "heart":
            curve = [
                (
                    16 * math.sin(t) ** 3,
                    13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t),
                )
                for t in _steps(36)
            ]
            polygon([(math.atan2(cx, cy), math.hypot(cx, cy) / 15) for cx, cy in curve])
        case "cross":
            arm, long = 0.36, 1.1
            corners = [
                (-arm, -long), (arm, -long), (arm, -arm), (long, -arm), (long, arm), (arm, arm),
                (arm, long), (-arm, long), (-arm, arm), (-long, arm), (-long, -arm), (-arm, -arm),
            ]  # fmt: skip
            polygon([(math.atan2(cx, -cy), math.hypot(cx, cy)) for cx, cy in corners])
        case _:
            polygon([(angle, rng.uniform(0.55, 1.25)) for angle in _steps(rng.randint(5, 9))])


def _steps(count: int) -> list[float]:
    return [2 * math.pi * k / count for k in range(count)]


def label(scene: Scene, size: tuple[int, int], motion: str = "") -> Labels:
    """What covers most of each merged token.

    `motion`: in which direction the first thing moves, in a video.
    """
    labels = Labels(size)
    best = np.zeros(labels.shape)
    for index, thing in enumerate(scene.things):
        radius = thing.radius * min(size)
        labels.add_thing(thing.x * size[0], thing.y * size[1], thing.color, thing.shape)
        for row, column, share in labels.overlaps(thing.x * size[0], thing.y * size[1], radius, radius):
            if share > max(best[row, column], 0.03):
                best[row, column] = share
                is_enough = share > 0.2  # an edge says little
                labels.set("shape", row, column, thing.shape if is_enough else "")
                labels.set("color", row, column, thing.color if share > 0.1 else "")
                labels.set("size", row, column, thing.size if is_enough else "")
                labels.set("cell", row, column, thing.cell if thing.has_clear_place and is_enough else "")
                if motion:
                    labels.set("motion", row, column, motion if index == 0 else "")
    return labels
