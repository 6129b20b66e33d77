"""Dense labels: for every merged vision token, which of some classes covers it, in several heads.

The vision tower learns these first. End to end, from the answers alone, it would stay at chance for a long time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tools.tiny_model.names import CELLS, CLOTHES, COLORS, EMOJI, SHAPES

IGNORED = -100
TOKEN = 28  # pixels a side of what one merged token sees
GLYPHS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Head(NamedTuple):
    name: str
    start: int  # of its classes among all of them
    size: int  # with class 0 for "nothing here"


class Labels:
    """Classes of each token of one picture: [rows, columns, heads] int64, 0 for nothing, IGNORED where it cannot be told."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.shape = (size[1] // TOKEN, size[0] // TOKEN)
        self.classes = np.zeros((*self.shape, len(HEADS)), dtype=np.int64)

    def set(self, head: str, row: int, column: int, name: str) -> None:
        """Says that `name` is there; "" is something that has no name in this head."""
        self.classes[row, column, HEAD_INDEX[head]] = _CLASSES[head][name] if name else IGNORED

    def fill(self, head: str, name: str) -> None:
        self.classes[..., HEAD_INDEX[head]] = _CLASSES[head][name] if name else IGNORED

    def add_centre(self, row: int, column: int) -> None:
        index = HEAD_INDEX["centres"]
        self.classes[row, column, index] = min(2, self.classes[row, column, index] + 1)

    def add_glyph(self, row: int, column: int, glyph: str) -> None:
        """Glyphs come in reading order; a token tells the first two whose centre it holds."""
        for head in ("glyph", "next_glyph"):
            if self.classes[row, column, HEAD_INDEX[head]] <= 0:
                self.classes[row, column, HEAD_INDEX[head]] = _CLASSES[head][glyph]
                return

    def token_at(self, x: float, y: float) -> tuple[int, int]:
        return (min(self.shape[0] - 1, max(0, int(y // TOKEN))), min(self.shape[1] - 1, max(0, int(x // TOKEN))))

    def overlaps(self, x: float, y: float, half_width: float, half_height: float) -> Iterator[tuple[int, int, float]]:
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
        "centres": ("1", "2"),
        "glyph": tuple(GLYPHS),
        "next_glyph": tuple(GLYPHS),
        "kind": (*CLOTHES, *EMOJI, "photo"),
    }
    heads, start = [], 0
    for name, classes in names.items():
        heads.append(Head(name, start, 1 + len(classes)))
        start += 1 + len(classes)
    return {name: {c: 1 + i for i, c in enumerate(classes)} for name, classes in names.items()}, tuple(heads)


_CLASSES, HEADS = _heads()
HEAD_INDEX = {head.name: index for index, head in enumerate(HEADS)}
NUM_CLASSES = HEADS[-1].start + HEADS[-1].size
