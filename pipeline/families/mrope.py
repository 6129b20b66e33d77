"""Multimodal rotary positions: a token has a place in time, height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.families.base import Positions
from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span
from pipeline.wire.packing import Int32Array


class Run(NamedTuple):
    """A run of placeholders and the grid of merged patches that it stands for."""

    span: Span
    grid: GridTHW  # of tokens
    time_step: float = 1.0  # positions between two neighbours in time; what they add up to is rounded down


def merged_grid(grid: GridTHW, merge_size: int) -> GridTHW:
    """The grid of tokens of a grid of patches."""
    return GridTHW(grid.t, grid.h // merge_size, grid.w // merge_size)


def mrope_positions(num_tokens: int, runs: Sequence[Run]) -> Positions:
    """Positions (time, height, width) of a prompt's tokens (M-RoPE, Wang et al. 2024).

    Text counts on by one in all three rows. A run starts where the text before it ended and spans its grid in
    three dimensions. The text behind it goes on after the largest position so far in any row.
    """
    rows = np.empty((3, num_tokens), dtype=np.int32)
    index, position = 0, 0
    for span, grid, time_step in runs:
        position = _count_on(rows, index, span.offset, position)
        time, height, width = np.indices(tuple(grid)).reshape(3, -1)
        # The product in float32, as in transformers: it decides which side of a whole number it is on.
        time = (time.astype(np.float32) * np.float32(time_step)).astype(np.int64)
        rows[:, span.offset : span.stop] = np.stack([time, height, width]) + position
        index, position = span.stop, position + max(int(time[-1]) + 1, grid.h, grid.w)
    end = _count_on(rows, index, num_tokens, position)
    return Positions(rows, end - num_tokens)


def _count_on(rows: Int32Array, start: int, stop: int, position: int) -> int:
    """Text from `start` to `stop`; returns the position after it."""
    rows[:, start:stop] = np.arange(position, position + stop - start)
    return position + stop - start
