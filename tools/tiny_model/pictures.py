"""Pictures that are not scenes of shapes: print, clothing, emoji, bar charts, photos; and short videos of
shapes.

Each function draws one from a `random.Random` and returns it with its truth and its dense labels. `held_out`
picks what no training picture holds: other typefaces, the test pictures of the clothing set, emoji mirrored
and turned further, other photos.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tools.tiny_model import assets
from tools.tiny_model.labels import GLYPHS, Labels
from tools.tiny_model.names import CLOTHES, COLORS, DIRECTIONS, EMOJI, Color
from tools.tiny_model.scenes import (
    HELD_OUT_PAIRS,
    Scene,
    Thing,
    add_grain,
    colors_on,
    draw,
    is_at_held_out_place,
    label,
    make_scene,
    pick_ground,
    shift,
)

WORDS = (
    "stop", "open", "exit", "push", "pull", "yes", "no", "hello", "sale", "cafe", "hotel", "taxi", "bus",
    "bank", "shop", "park", "cat", "dog",
    "bird", "fish", "tree", "milk", "tea", "water", "bread", "apple", "red", "blue", "green", "one", "two",
    "three", "up", "down", "left",
    "right", "north", "south", "east", "west", "hot", "cold", "new", "old", "free", "menu", "pizza", "music",
    "book", "game", "home", "love",
    "happy", "sun", "moon", "star", "time", "help", "day", "night",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Picture:
    """An image, or a video as the frames of its temporal patches."""

    frames: tuple[Image.Image, ...]  # RGB, all of one size: one for an image, an even number for a video
    labels: tuple[Labels, ...]  # one for an image, one for each two frames of a video

    @property
    def is_video(self) -> bool:
        return len(self.frames) > 1


def still(image: Image.Image, labels: Labels) -> Picture:
    return Picture((image,), (labels,))


def of_scene(scene: Scene, size: tuple[int, int]) -> Picture:
    return still(draw(scene, size), label(scene, size))


def draw_print(rng: random.Random, size: tuple[int, int], text: str, held_out: bool) -> tuple[Picture, str]:
    """A number or a word, large, turned by up to 20 degrees; the colour of its ink."""
    ground = pick_ground(rng)
    ink = rng.choice(colors_on(ground))
    color = shift(COLORS[ink], rng, 16)
    shown = text if text.isdigit() else rng.choice((text, text.upper(), text.capitalize()))
    width, height = size[0] * 2, size[1] * 2
    path = rng.choice(assets.fonts(held_out) or assets.fonts(False))
    points = rng.uniform(0.28, 0.7) * height
    face = _face(path, points)
    box = face.getbbox(shown, anchor="ls")
    room = rng.uniform(0.7, 0.92) * width
    if box[2] - box[0] > room:
        points *= room / (box[2] - box[0])
        face = _face(path, points)
        box = face.getbbox(shown, anchor="ls")
    turn = math.radians(rng.choice((0.0, 0.0, rng.uniform(-8, 8), rng.uniform(-20, 20))))
    margin_x, margin_y = (
        max(0.0, (side - extent) / 2 * 0.6)
        for side, extent in ((width, box[2] - box[0]), (height, box[3] - box[1]))
    )
    x = width / 2 + rng.uniform(-margin_x, margin_x) * 0.8
    y = height / 2 + rng.uniform(-margin_y, margin_y) * 0.8
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    image = Image.new("RGB", (width, height), ground)
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).text((x - middle[0], y - middle[1]), shown, font=face, fill=255, anchor="ls")
    if turn:
        mask = mask.rotate(-math.degrees(turn), Image.Resampling.BILINEAR, center=(x, y))
    image.paste(Image.new("RGB", (width, height), color), mask=mask)
    labels = Labels(size)
    half_width, half_height = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    for row, column, share in labels.overlaps(x / 2, y / 2, half_width, half_height):
        labels.set("color", row, column, ink if share > 0.4 else "")
    start, centres = 0.0, []
    for index, glyph in enumerate(shown):
        end = face.getlength(shown[: index + 1])
        along = ((start + end) / 2 - middle[0]) / 2
        token = labels.token_at(x / 2 + along * math.cos(turn), y / 2 + along * math.sin(turn))
        labels.add_glyph(*token, glyph.lower())
        labels.set("color", *token, ink)
        centres.append((x / 2 + along * math.cos(turn), y / 2 + along * math.sin(turn), (end - start) / 4))
        start = end
    for (glyph_x, glyph_y, glyph_width), glyph in zip(centres, shown, strict=True):
        labels.cover_with_glyph(glyph_x, glyph_y, glyph_width, half_height, glyph.lower())
    return still(add_grain(image.reduce(2), rng), labels), ink


def draw_glyphs(rng: random.Random, size: tuple[int, int]) -> Picture:
    """Single letters and digits, one in each ninth: for the tower alone, which learns far more from many
    things a picture."""
    ground = pick_ground(rng)
    width, height = size[0] * 2, size[1] * 2
    image = Image.new("RGB", (width, height), ground)
    labels = Labels(size)
    known = colors_on(ground)
    fonts = assets.fonts(False)
    side = rng.choice((3, 3, 4))
    for row in range(side):
        for column in range(side):
            glyph = rng.choice(GLYPHS[:10]) if rng.random() < 0.5 else rng.choice(GLYPHS)
            ink = rng.choice(known)
            face = _face(rng.choice(fonts), rng.uniform(0.55, 1.0 if side == 3 else 1.15) * height / side)
            x = (column + rng.uniform(0.42, 0.58)) / side * width
            y = (row + rng.uniform(0.42, 0.58)) / side * height
            mask = Image.new("L", (width // side, height // side), 0)
            shown = rng.choice((glyph, glyph.upper()))
            box = face.getbbox(shown, anchor="ls")
            at = (mask.width / 2 - (box[0] + box[2]) / 2, mask.height / 2 - (box[1] + box[3]) / 2)
            ImageDraw.Draw(mask).text(at, shown, font=face, fill=255, anchor="ls")
            if rng.random() < 0.5:
                mask = mask.rotate(rng.uniform(-18, 18), Image.Resampling.BILINEAR)
            color = shift(COLORS[ink], rng, 16)
            image.paste(color, (int(x - mask.width / 2), int(y - mask.height / 2)), mask)
            token = labels.token_at(x / 2, y / 2)
            labels.add_glyph(*token, glyph)
            labels.cover_with_glyph(x / 2, y / 2, (box[2] - box[0]) / 4, (box[3] - box[1]) / 4, glyph)
            labels.set("color", *token, ink)
    return still(add_grain(image.reduce(2), rng), labels)


def draw_sheet(rng: random.Random, size: tuple[int, int], side: int, kind: str) -> Picture | None:
    """Emoji, or clothes, in `side` rows of `side`: for the tower alone."""
    image = Image.new("RGB", size, pick_ground(rng))
    labels = Labels(size)
    labels.ignore_all_but("kind")
    cell = min(size) // side
    for row in range(side):
        for column in range(side):
            drawn = (
                draw_emoji(rng, (cell, cell), False)
                if kind == "emoji"
                else draw_clothes(rng, (cell, cell), False)
            )
            if drawn is None:
                return None
            x, y = (
                int((column + 0.5) / side * size[0] - cell / 2),
                int((row + 0.5) / side * size[1] - cell / 2),
            )
            image.paste(drawn[0].frames[0], (x, y))
            for token_row, token_column, share in labels.overlaps(
                x + cell / 2, y + cell / 2, cell / 2, cell / 2
            ):
                if share > 0.3:
                    labels.set("kind", token_row, token_column, drawn[1] if share > 0.6 else "")
    return still(image, labels)


def _face(path: str, points: float) -> ImageFont.FreeTypeFont:
    face = ImageFont.truetype(path, int(points)) if path else ImageFont.load_default(size=int(points))
    assert isinstance(face, ImageFont.FreeTypeFont)
    return face


def draw_clothes(rng: random.Random, size: tuple[int, int], test: bool) -> tuple[Picture, str] | None:
    """A picture of Fashion-MNIST, enlarged and tinted; its class. None without the data."""
    if (data := assets.clothes(test)) is None:
        return None
    index = rng.randrange(len(data[0]))
    pixels = Image.fromarray(data[0][index])
    if not test and rng.random() < 0.5:
        pixels = ImageOps.mirror(pixels)
    side = int(min(size) * rng.uniform(0.72, 0.98))
    mask = pixels.resize((side, side), Image.Resampling.BICUBIC)
    image = Image.new("L", size, 0)
    image.paste(mask, (rng.randint(0, size[0] - side), rng.randint(0, size[1] - side)))
    if rng.random() < 0.6:  # dark on white, as a shop would show it
        image = ImageOps.invert(image)
    colored = image.convert("RGB")
    if rng.random() < 0.3:
        colored = ImageOps.colorize(image, _random_color(rng, 0, 80), _random_color(rng, 190, 255))
    labels = Labels(size)
    name = CLOTHES[int(data[1][index])]
    labels.ignore_all_but("kind")
    labels.fill("kind", name)
    return still(colored, labels), name


def _random_color(rng: random.Random, low: int, high: int) -> Color:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def draw_emoji(rng: random.Random, size: tuple[int, int], held_out: bool) -> tuple[Picture, str] | None:
    """One emoji on a plain ground. None without the font."""
    name = rng.choice(list(EMOJI))
    if (drawn := assets.emoji(name)) is None:
        return None
    emoji = drawn.copy()
    turn = rng.uniform(-14, 14)
    if held_out:
        emoji = ImageOps.mirror(emoji)
        turn = rng.choice((-1, 1)) * rng.uniform(14, 28)
    side = rng.uniform(0.4, 0.95) * min(size)
    emoji.thumbnail((side * 1.5, side * 1.5), Image.Resampling.BILINEAR)  # turning is slow
    emoji = emoji.rotate(turn, Image.Resampling.BICUBIC, expand=True)
    scale = side / max(emoji.size)
    emoji = emoji.resize(
        (max(1, int(emoji.width * scale)), max(1, int(emoji.height * scale))), Image.Resampling.BICUBIC
    )
    image = Image.new("RGB", size, pick_ground(rng))
    x, y = rng.randint(0, size[0] - emoji.width), rng.randint(0, size[1] - emoji.height)
    image.paste(emoji, (x, y), emoji)
    labels = Labels(size)
    labels.ignore_all_but("kind", "glyph", "next_glyph", "motion")
    for row, column, share in labels.overlaps(
        x + emoji.width / 2, y + emoji.height / 2, emoji.width / 2, emoji.height / 2
    ):
        labels.set("kind", row, column, name if share > 0.25 else "")
    return still(add_grain(image, rng), labels), name


@dataclass(frozen=True, slots=True)
class Chart:
    colors: tuple[str, ...]  # of the bars, from left to right
    heights: tuple[float, ...]  # 0 to 1; any two differ by at least 0.09


def draw_chart(rng: random.Random, size: tuple[int, int]) -> tuple[Picture, Chart]:
    """Two to five upright bars of different colours and heights on axes."""
    ground = pick_ground(rng)
    known = colors_on(ground)
    count = rng.randint(2, min(5, len(known)))
    levels = rng.sample(range(10), count)
    chart = Chart(
        tuple(rng.sample(known, count)),
        tuple(0.1 + 0.1 * level + rng.uniform(-0.005, 0.005) for level in levels),
    )
    width, height = size[0] * 2, size[1] * 2
    image = Image.new("RGB", (width, height), ground)
    pen = ImageDraw.Draw(image)
    left, bottom, top = (
        width * rng.uniform(0.05, 0.12),
        height * rng.uniform(0.88, 0.95),
        height * rng.uniform(0.05, 0.12),
    )
    slot = (width * 0.96 - left) / count
    thickness = slot * rng.uniform(0.45, 0.8)
    labels = Labels(size)
    for index, (name, share) in enumerate(zip(chart.colors, chart.heights, strict=True)):
        x = left + (index + 0.5) * slot
        y = bottom - share * (bottom - top)
        color = shift(COLORS[name], rng, 16)
        pen.rectangle((x - thickness / 2, y, x + thickness / 2, bottom), fill=color)
        for row, column, covered in labels.overlaps(x / 2, (y + bottom) / 4, thickness / 4, (bottom - y) / 4):
            if covered > 0.25:
                labels.set("shape", row, column, "bar")
                labels.set("color", row, column, name)
        labels.add_thing(x / 2, bottom / 2 - 10, name, "bar")
    line = (30, 30, 30) if sum(ground) > 250 else (225, 225, 225)
    if rng.random() < 0.85:
        pen.line((left, top, left, bottom), fill=line, width=3)
    pen.line((left, bottom, width * 0.98, bottom), fill=line, width=3)
    return still(add_grain(image.reduce(2), rng), labels), chart


def draw_photo(rng: random.Random, size: tuple[int, int], held_out: bool) -> Picture | None:
    """A crop of a photo. None without the packages that carry them."""
    if not (photos := assets.photos(held_out)):
        return None
    photo = rng.choice(photos)
    height = int(photo.height * rng.uniform(0.35, 1.0))
    width = min(photo.width, int(height * size[0] / size[1]))
    x, y = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
    image = photo.resize(size, Image.Resampling.BILINEAR, box=(x, y, x + width, y + height))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    labels = Labels(size)
    labels.fill("kind", "photo")
    return still(image, labels)


@dataclass(frozen=True, slots=True)
class Clip:
    """What happens in a video: a thing moves, things appear one after the other, or a thing changes its
    colour."""

    event: str  # "moves", "appears", "turns"
    things: tuple[Thing, ...]  # as they are at first; the event is about the first one, or in this order
    direction: str = ""
    color: str = ""  # that the first thing turns


Shown = list[tuple[Thing, ...]]  # what each frame has


def _appears(rng: random.Random, things: tuple[Thing, ...]) -> tuple[Clip, Shown]:
    order = tuple(rng.sample(things, len(things)))
    return Clip("appears", order), [order[: 1 + index] for index in range(len(order)) for _ in range(2)]


def _turns(rng: random.Random, scene: Scene, num_patches: int) -> tuple[Clip, Shown]:
    first, *others = scene.things
    colors = [
        name
        for name in colors_on(scene.ground)
        if name != first.color and (name, first.shape) not in HELD_OUT_PAIRS
    ]
    color = rng.choice(colors)
    after = (replace(first, color=color), *others)
    return Clip("turns", scene.things, color=color), [scene.things] * num_patches + [after] * num_patches


def _moves(rng: random.Random, things: tuple[Thing, ...], num_patches: int) -> tuple[Clip, Shown] | None:
    """None where the first thing would pass over the second."""
    direction = rng.choice(list(DIRECTIONS))
    dx, dy = DIRECTIONS[direction]
    path = rng.uniform(0.35, 0.6)
    thing, *others = things
    start = replace(thing, x=_start(rng, dx, thing.x, path), y=_start(rng, dy, thing.y, path))
    if others:
        other = others[0]
        distance = abs((other.x - start.x) * dy) + abs((other.y - start.y) * dx)
        if distance < 1.3 * (start.radius + other.radius):
            return None
    last = 2 * num_patches - 1
    moved = [
        replace(start, x=start.x + dx * path * number / last, y=start.y + dy * path * number / last)
        for number in range(last + 1)
    ]
    shown: Shown = [(thing, *others) for thing in moved]
    return Clip("moves", (start, *others), direction=direction), shown


def draw_clip(rng: random.Random, size: tuple[int, int], held_out: bool) -> tuple[Picture, Clip] | None:
    """4 or 6 frames of one event. None when the drawn scene does not suit it."""
    event = rng.choices(("moves", "appears", "turns"), weights=(3, 2, 1))[0]
    num_patches = (
        3 if event == "appears" and rng.random() < 0.5 else 2 if event == "appears" else rng.choice((2, 3))
    )
    scene = make_scene(rng, rng.choice((1, 2, 2)) if event != "appears" else num_patches, held_out)
    things = scene.things
    if (
        not things
        or len({thing.name for thing in things}) < len(things)
        or (event == "appears" and len(things) < 2)
    ):
        return None
    if event == "appears":
        clip, shown = _appears(rng, things)
    elif event == "turns":
        clip, shown = _turns(rng, scene, num_patches)
    else:
        found = _moves(rng, things, num_patches)
        if found is None:
            return None
        clip, shown = found
    scenes = [Scene(tuple(now), scene.ground, scene.seed) for now in shown]
    if not held_out and any(is_at_held_out_place(thing) for now in scenes for thing in now.things):
        return None
    # A token sees two frames: it is labelled with what stands half way between them.
    halfway = [
        Scene(_halfway(*pair), scene.ground, scene.seed)
        for pair in zip(scenes[::2], scenes[1::2], strict=True)
    ]
    return Picture(
        tuple(draw(now, size) for now in scenes), tuple(label(now, size, clip.direction) for now in halfway)
    ), clip


def _halfway(before: Scene, after: Scene) -> tuple[Thing, ...]:
    return tuple(
        replace(one, x=(one.x + other.x) / 2, y=(one.y + other.y) / 2)
        for one, other in zip(before.things, after.things, strict=True)
    )


def _start(rng: random.Random, step: int, where: float, path: float) -> float:
    if not step:
        return where
    low = rng.uniform(0.12, 0.88 - path)
    return low if step > 0 else low + path


class Arrays(NamedTuple):
    """T temporal patches of one picture."""

    pixels: np.ndarray  # [T, 2, height, width, 3] uint8: an image counts twice
    classes: np.ndarray  # [T, rows, columns, heads] int64
    mass: np.ndarray  # [T, rows, columns, counted] float32


def as_arrays(picture: Picture) -> Arrays:
    frames: Sequence[Image.Image] = picture.frames if picture.is_video else picture.frames * 2
    pixels = np.stack([np.asarray(frame) for frame in frames])
    classes, mass = (
        np.stack([getattr(labels, name) for labels in picture.labels]) for name in ("classes", "mass")
    )
    return Arrays(pixels.reshape(-1, 2, *pixels.shape[1:]), classes, mass)
