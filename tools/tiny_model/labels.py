"""Dense labels: for every merged vision token, which of some classes covers it, in several heads, and its
share of each thing.

The vision tower learns these first. End to end, from the answers alone, it would stay at chance for a long
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tools.tiny_model.names import CELLS, CLOTHES, COLORS, DIRECTIONS, EMOJI, SHAPES

IGNORED = -100
TOKEN = 28  # pixels a side of what one merged token sees
CORE = 9.0  # half a side, in pixels, of the box around a thing's centre that is shared out among the tokens
# what the density maps are of: all things, those of each colour, those of each shape
COUNTED = ("", *COLORS, *SHAPES)
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Head(NamedTuple):
    name: str
    start: int  # of its classes among all of them
    size: int  # with class 0 for "nothing here"


class Labels:
    """Classes of each token of one picture, and how many things are in it.

    `classes`: [rows, columns, heads] int64, 0 for nothing, IGNORED where it cannot be told. `mass`: [rows,
    columns, len(COUNTED)] float32, the share that the token has in the cores of things, so that its sum over
    the picture is their number (density maps, as crowds are counted with: Lempitsky and Zisserman, 2010); NaN
    where nobody counts. With one map for each colour and shape, how many red ones there are is a plain sum
    over tokens, which is what attention can do.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = (size[1] // TOKEN, size[0] // TOKEN)
        self.classes = np.zeros((*self.shape, len(HEADS)), dtype=np.int64)
        self.mass = np.zeros((*self.shape, len(COUNTED)), dtype=np.float32)

    def set(self, head: str, row: int, column: int, name: str) -> None:
        """Says that `name` is there; "" is something that has no name in this head."""
        self.classes[row, column, HEAD_INDEX[head]] = _CLASSES[head][name] if name else IGNORED

    def fill(self, head: str, name: str) -> None:
        self.classes[..., HEAD_INDEX[head]] = _CLASSES[head][name] if name else IGNORED

    def ignore_all_but(self, *heads: str) -> None:
        """Nothing is known of the other heads, nor of how many things there are."""
        for head in HEADS:
            if head.name not in heads:
                self.fill(head.name, "")
        self.mass[:] = np.nan

    def add_thing(self, x: float, y: float, color: str, shape: str) -> None:
        """Counts a thing with its centre there, in pixels.

        Where its colour or shape has no name, nobody counts those there.
        """
        shares = list(self.overlaps(x, y, CORE, CORE))
        total = sum(share for _, _, share in shares)  # less than all of it at the edge of the picture
        for row, column, share in shares:
            mass = self.mass[row, column]
            mass[0] += share / total
            for name, names in ((color, _COUNTED_COLORS), (shape, _COUNTED_SHAPES)):
                if name in COUNTED[1:]:
                    mass[COUNTED.index(name)] += share / total
                elif not name:
                    mass[names] = np.nan

    def add_glyph(self, row: int, column: int, glyph: str) -> None:
        """Glyphs come in reading order; a token tells the first two whose centre it holds."""
        for head in ("glyph", "next_glyph"):
            if self.classes[row, column, HEAD_INDEX[head]] <= 0:
                self.classes[row, column, HEAD_INDEX[head]] = _CLASSES[head][glyph]
                return

    def cover_with_glyph(self, x: float, y: float, half_width: float, half_height: float, glyph: str) -> None:
        """What a large glyph covers besides the token of its centre."""
        for row, column, share in self.overlaps(x, y, half_width, half_height):
            if self.classes[row, column, HEAD_INDEX["glyph"]] <= 0 and share > 0.15:
                self.set("glyph", row, column, glyph if share > 0.55 else "")

    def token_at(self, x: float, y: float) -> tuple[int, int]:
        return (
            min(self.shape[0] - 1, max(0, int(y // TOKEN))),
            min(self.shape[1] - 1, max(0, int(x // TOKEN))),
        )

    def overlaps(
        self, x: float, y: float, half_width: float, half_height: float
    ) -> Iterator[tuple[int, int, float]]:
        """Tokens under a box around (x, y), in pixels, with the share of the token that it covers."""
        for row in range(self.shape[0]):
            dy = min(y + half_height, (row + 1) * TOKEN) - max(y - half_height, row * TOKEN)
            if dy <= 0:
                continue
            for column in range(self.shape[1]):
                dx = min(x + half_width, (column + 1) * TOKEN) - max(x - half_width, column * TOKEN)
                if dx > 0:
                    yield row, column, dx * dy / TOKEN**2


def _heads() -> tuple[dict[str, dict[str, int]], tuple[Head, ...]]:
    names = {
        "shape": (*SHAPES, "bar"),
        "color": tuple(COLORS),
        "size": ("small", "large"),
        "cell": CELLS,
        "glyph": tuple(GLYPHS),
        "next_glyph": tuple(GLYPHS),
        "kind": (*CLOTHES, *EMOJI, "photo"),
        "motion": tuple(DIRECTIONS),
    }
    heads, start = [], 0
    for name, classes in names.items():
        heads.append(Head(name, start, 1 + len(classes)))
        start += 1 + len(classes)
    return {name: {c: 1 + i for i, c in enumerate(classes)} for name, classes in names.items()}, tuple(heads)


_COUNTED_COLORS, _COUNTED_SHAPES = slice(1, 1 + len(COLORS)), slice(1 + len(COLORS), len(COUNTED))
_CLASSES, HEADS = _heads()
HEAD_INDEX = {head.name: index for index, head in enumerate(HEADS)}
NUM_CLASSES = HEADS[-1].start + HEADS[-1].size
