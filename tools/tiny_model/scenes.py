"""Pictures drawn on the fly: coloured shapes on a plain ground, or a printed number.

Everything is drawn from a `random.Random`, so a seed names a picture. A scene keeps the truth about itself; `questions.py`
asks about it and `dense_labels` says what covers each merged vision token, which is what the vision tower learns first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (245, 138, 20),
    "yellow": (248, 222, 40),
    "green": (40, 160, 62),
    "blue": (36, 76, 212),
    "purple": (140, 46, 168),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
}
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
# Colour-shape pairs that no training picture shows: evaluation asks for them by name.
HELD_OUT_PAIRS = frozenset(
    {("red", "star"), ("blue", "cross"), ("green", "triangle"), ("yellow", "ring"), ("purple", "square"), ("orange", "circle")}
)
NUM_DENSE_CLASSES = (1 + len(SHAPES), 1 + len(COLORS), 11)  # shape, colour, digit; class 0 is "none"
SIZES = ((112, 112), (140, 140), (140, 112), (112, 140))  # (width, height) in pixels


@dataclass(frozen=True, slots=True)
class Thing:
    shape: str
    color: str
    x: float  # centre, 0 to 1 of the width
    y: float
    radius: float  # share of the shorter side

    @property
    def cell(self) -> str:
        return CELLS[min(2, int(self.y * 3)) * 3 + min(2, int(self.x * 3))]

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    things: tuple[Thing, ...]
    number: str  # digits printed on the picture, or ""
    ground: tuple[int, int, int]
    ink: str  # colour of the number
    seed: int


def make_scene(rng: random.Random, held_out: bool = False, crowded: bool = False) -> Scene:
    """A random scene of up to 4 things. With `held_out`, its first thing is one of HELD_OUT_PAIRS; without, none is.

    A `crowded` scene has 5 to 9 things: more dense labels a picture, for the vision tower alone.
    """
    grey = rng.randint(120, 205)
    ground = (*(max(0, min(255, grey + rng.randint(-14, 14))) for _ in range(3)),)
    seed = rng.getrandbits(32)
    if not held_out and rng.random() < 0.15:
        number = str(rng.randint(0, 9)) if rng.random() < 0.5 else str(rng.randint(10, 999))
        return Scene((), number, ground, rng.choice(list(COLORS)), seed)  # type: ignore[arg-type]
    count = rng.randint(5, 9) if crowded else rng.choices(range(5), weights=(1, 6, 6, 6, 6))[0]
    count = max(count, int(held_out))
    things: list[Thing] = []
    for cell in rng.sample(range(9), count):
        color, shape = _pick_pair(rng, held_out and not things)
        row, column = divmod(cell, 3)
        jitter = 0.055
        radius = rng.uniform(0.085, 0.155)
        x = (column + 0.5) / 3 + rng.uniform(-jitter, jitter)
        y = (row + 0.5) / 3 + rng.uniform(-jitter, jitter)
        if count == 1 and rng.random() < 0.35:  # one large thing, as people tend to draw
            radius, x, y = rng.uniform(0.2, 0.36), rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
        things.append(Thing(shape, color, x, y, radius))
    return Scene(tuple(things), "", ground, "black", seed)  # type: ignore[arg-type]


def _pick_pair(rng: random.Random, held_out: bool) -> tuple[str, str]:
    if held_out:
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = (rng.choice(list(COLORS)), rng.choice(SHAPES))
        if pair not in HELD_OUT_PAIRS:
            return pair


def draw(scene: Scene, size: tuple[int, int]) -> Image.Image:
    """The scene as an RGB picture of `size` (width, height), drawn at twice the size and reduced."""
    rng = random.Random(scene.seed)
    scale = 2
    width, height = size[0] * scale, size[1] * scale
    image = Image.new("RGB", (width, height), scene.ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        color = _vary(COLORS[thing.color], rng)
        centre = (thing.x * width, thing.y * height)
        _draw_shape(pen, thing.shape, centre, thing.radius * min(width, height), color, scene.ground, rng)
    if scene.number:
        font = ImageFont.truetype(path, 40) if (path := rng.choice(fonts())) else None
        points = rng.uniform(0.3, 0.62) * height
        face = font.font_variant(size=int(points)) if font else ImageFont.load_default(size=points)
        box = pen.textbbox((0, 0), scene.number, font=face)
        if box[2] - box[0] > width * 0.92:
            points *= width * 0.92 / (box[2] - box[0])
            face = font.font_variant(size=int(points)) if font else ImageFont.load_default(size=points)
        place = (width * rng.uniform(0.47, 0.53), height * rng.uniform(0.44, 0.56))
        pen.text(place, scene.number, font=face, fill=_vary(COLORS[scene.ink], rng), anchor="mm")
    image = image.resize(size, Image.Resampling.BICUBIC)
    noise = rng.choice((0, 0, 3, 6))
    if noise:
        pixels = np.asarray(image, dtype=np.int16)
        grain = np.random.default_rng(scene.seed).integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
        image = Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))
    return image


@cache
def fonts() -> tuple[str, ...]:
    """Paths of the fonts for numbers; "" is the one inside Pillow, so the list is never empty."""
    folder = Path("/usr/share/fonts/truetype/dejavu")
    names = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSerif-Bold.ttf")
    return ("", *(str(folder / name) for name in names if (folder / name).exists()))


def _vary(color: Sequence[int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, c + rng.randint(-16, 16))) for c in color)
    return red, green, blue


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    color: tuple[int, int, int],
    ground: tuple[int, int, int],
    rng: random.Random,
) -> None:
    x, y = centre
    turn = rng.uniform(-0.2, 0.2)

    def polygon(angles: Sequence[float], radii: Sequence[float]) -> None:
        points = [(x + r * math.sin(a + turn), y - r * math.cos(a + turn)) for a, r in zip(angles, radii, strict=True)]
        pen.polygon(points, fill=color)

    match shape:
        case "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        case "ring":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
            hole = radius * rng.uniform(0.5, 0.62)
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground)
        case "square":
            polygon([math.pi / 4 + k * math.pi / 2 for k in range(4)], [radius * 1.22] * 4)
        case "triangle":
            polygon([k * 2 * math.pi / 3 for k in range(3)], [radius * 1.2] * 3)
        case "star":
            polygon([k * math.pi / 5 for k in range(10)], [radius * (1.25 if k % 2 == 0 else 0.52) for k in range(10)])
        case "cross":
            arm, long = 0.36, 1.1
            corners = [
                (-arm, -long), (arm, -long), (arm, -arm), (long, -arm), (long, arm), (arm, arm),
                (arm, long), (-arm, long), (-arm, arm), (-long, arm), (-long, -arm), (-arm, -arm),
            ]  # fmt: skip
            polygon([math.atan2(cx, -cy) for cx, cy in corners], [radius * math.hypot(cx, cy) for cx, cy in corners])


def dense_labels(scene: Scene, size: tuple[int, int], cell: int = 28) -> np.ndarray:
    """What covers most of each merged token: [rows, columns, 3] int64 of shape, colour and digit class; 0 is nothing."""
    rows, columns = size[1] // cell, size[0] // cell
    labels = np.zeros((rows, columns, 3), dtype=np.int64)
    best = np.zeros((rows, columns))
    for thing in scene.things:
        radius = thing.radius * min(size)
        for row in range(rows):
            for column in range(columns):
                dx = _overlap(thing.x * size[0], radius, column * cell, cell)
                dy = _overlap(thing.y * size[1], radius, row * cell, cell)
                if dx * dy > max(best[row, column], 0.05 * cell * cell):
                    best[row, column] = dx * dy
                    labels[row, column, 0] = 1 + SHAPES.index(thing.shape)
                    labels[row, column, 1] = 1 + list(COLORS).index(thing.color)
    if scene.number:
        # The number stands near the middle and fills at most 0.92 of the width: one class a column of its span.
        for column in range(columns):
            place = ((column + 0.5) / columns - 0.5) / 0.6 + 0.5
            index = min(len(scene.number) - 1, max(0, int(place * len(scene.number))))
            labels[rows // 2, column, 2] = 1 + int(scene.number[index])
            labels[(rows - 1) // 2, column, 2] = 1 + int(scene.number[index])
            labels[rows // 2, column, 1] = labels[(rows - 1) // 2, column, 1] = 1 + list(COLORS).index(scene.ink)
    return labels


def _overlap(centre: float, radius: float, start: float, length: float) -> float:
    return max(0.0, min(centre + radius, start + length) - max(centre - radius, start))
