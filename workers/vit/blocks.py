"""A forward in blocks of bounded work, with a callback after each.

On a slow processor one layer of a large picture takes minutes. For the launcher to tell that from a hang, the
worker must report progress by work done, not by layers. Each block is one call of torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import row_attention

BLOCK_FLOP = 2e10  # for each thread: seconds at most, even on a slow and shared core
HURRIED_S = 0.002  # of a block while another process waits for the cores
FIRST_RATE = 5e10  # floating point operations in a second, until it has been measured
SMOOTHING = 0.2  # weight of the newest block
ROWS, ATTENTION = "rows", "attention"  # kinds of blocks, with rates of their own


def attend_to(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Attention [segments, heads, num_rows, head_dim] of rows of q within each segment, into out."""
    if not row_attention.attend_within(q, k, v, out):
        out.copy_(F.scaled_dot_product_attention(q, k, v))


class Hurry:
    """Bounds blocks in time while `is_hurried`, by the rate of the blocks of their kind before."""

    def __init__(
        self, is_hurried: Callable[[], bool], clock: Callable[[], float] = time.perf_counter
    ) -> None:  # fmt: skip
        self.is_hurried, self.clock = is_hurried, clock
        self._rates: dict[str, float] = {}

    def max_flop(self, kind: str) -> float:
        return self._rates.get(kind, FIRST_RATE) * HURRIED_S

    def observe(self, kind: str, flop: float, seconds: float) -> None:
        if seconds > 0:
            rate = flop / seconds
            self._rates[kind] = self._rates.get(kind, rate) * (1 - SMOOTHING) + rate * SMOOTHING


class Blocks:
    """`after_block` is called after at most `max_flop` floating point operations, or after those that `hurry`
    allows."""

    def __init__(
        self, max_flop: float, after_block: Callable[[], object], hurry: Hurry | None = None
    ) -> None:  # fmt: skip
        self._max_flop, self._after_block = max_flop, after_block
        self._hurry = hurry or Hurry(lambda: False)

    def rows(
        self, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function(*inputs)` by rows: inputs and results are [num_rows, …], and rows are independent."""
        parts: list[tuple[Tensor, ...]] = []
        for piece in self._pieces(ROWS, len(inputs[0]), flop_per_row):
            start = self._hurry.clock()
            parts.append(function(*(x[piece] for x in inputs)))
            self._end_block(ROWS, flop_per_row * len(inputs[0][piece]), start)
        return parts[0] if len(parts) == 1 else tuple(torch.cat(same) for same in zip(*parts, strict=True))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [segments, heads, num_rows, head_dim]: by segments, by heads of one, or by rows of one
        head."""
        _, num_heads, num_rows, head_dim = q.shape
        flop_per_row = 4.0 * num_rows * head_dim
        out = torch.empty_like(q)
        for segments in self._pieces(ATTENTION, len(q), flop_per_row * num_rows * num_heads):
            of_head = flop_per_row * len(q[segments])
            for heads in self._pieces(ATTENTION, num_heads, of_head * num_rows):
                queries, keys, values = q[segments, heads], k[segments, heads], v[segments, heads]
                for rows in self._pieces(ATTENTION, num_rows, of_head * queries.shape[1]):
                    start, some = self._hurry.clock(), queries[:, :, rows]
                    attend_to(some, keys, values, out[segments, heads, rows])
                    self._end_block(ATTENTION, 4.0 * some.numel() * num_rows, start)
        return out

    def _end_block(self, kind: str, flop: float, start: float) -> None:
        self._hurry.observe(kind, flop, self._hurry.clock() - start)
        self._after_block()

    def _pieces(self, kind: str, count: int, flop_each: float) -> Iterator[slice]:
        start = 0
        while start < count:
            step = max(1, int(self._max_flop / flop_each))
            if self._hurry.is_hurried():
                most = max(1, int(self._hurry.max_flop(kind) / flop_each))
                # Powers of 2: a kernel is prepared for each new number of rows.
                step = min(step, 1 << most.bit_length() - 1)
            yield slice(start, start + step)
            start += step
