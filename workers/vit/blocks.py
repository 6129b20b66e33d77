"""A forward in blocks of bounded work, with a callback after each.

On a slow processor one layer of a large picture takes minutes. For the launcher to tell that from a hang, the
worker must report progress by work done, not by layers. Each block is one call of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import row_attention

BLOCK_FLOP = 2e10  # for each thread: seconds at most, even on a slow and shared core


def attend_to(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Attention [segments, heads, num_rows, head_dim] of rows of q within each segment, into out."""
    if not row_attention.attend_within(q, k, v, out):
        out.copy_(F.scaled_dot_product_attention(q, k, v))


class Blocks:
    """`after_block` is called after at most `max_flop` floating point operations."""

    def __init__(self, max_flop: float, after_block: Callable[[], object]) -> None:
        self._max_flop, self._after_block = max_flop, after_block

    def rows(
        self, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """`function(*inputs)` by rows: inputs and results are [num_rows, …], and rows are independent."""
        parts: list[tuple[Tensor, ...]] = []
        for piece in self._pieces(len(inputs[0]), flop_per_row):
            parts.append(function(*(x[piece] for x in inputs)))
            self._after_block()
        return parts[0] if len(parts) == 1 else tuple(torch.cat(same) for same in zip(*parts, strict=True))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [segments, heads, num_rows, head_dim]: by segments, by heads of one, or by rows of one
        head."""
        _, num_heads, num_rows, head_dim = q.shape
        flop_per_row = 4.0 * num_rows * head_dim
        out = torch.empty_like(q)
        for segments in self._pieces(len(q), flop_per_row * num_rows * num_heads):
            of_head = flop_per_row * len(q[segments])
            for heads in self._pieces(num_heads, of_head * num_rows):
                queries, keys, values = q[segments, heads], k[segments, heads], v[segments, heads]
                for rows in self._pieces(num_rows, of_head * queries.shape[1]):
                    attend_to(queries[:, :, rows], keys, values, out[segments, heads, rows])
                    self._after_block()
        return out

    def _pieces(self, count: int, flop_each: float) -> Iterator[slice]:
        step = max(1, int(self._max_flop / flop_each))
        return (slice(start, start + step) for start in range(0, count, step))
