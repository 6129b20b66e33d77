"""A forward in blocks of bounded work, with a sign of life after each.

One layer of a large picture takes a slow processor minutes. Whoever watches for signs of life must tell that
from a hang, so signs follow the work that is done and not the layers. Each block is one call of torch, which
nobody can look into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_FLOP = 2e10  # of each thread: seconds at most, even on a slow core that others use, too


class Blocks:
    """`after_block` is called whenever at most `most_flop` floating point operations have been done."""

    def __init__(self, most_flop: float, after_block: Callable[[], object]) -> None:
        self._most_flop, self._after_block = most_flop, after_block

    def rows(
        self, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        """What `function` makes of inputs [num_rows, …], each [num_rows, …]; no row depends on another."""
        parts: list[tuple[Tensor, ...]] = []
        for piece in self._pieces(len(inputs[0]), flop_per_row):
            parts.append(function(*(x[piece] for x in inputs)))
            self._after_block()
        return parts[0] if len(parts) == 1 else tuple(torch.cat(same) for same in zip(*parts, strict=True))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [heads, num_rows, head_dim] of one picture: some heads at once, or some rows of one."""
        flop_per_row = 4.0 * k.shape[1] * k.shape[2]
        out: list[Tensor] = []
        for heads in self._pieces(len(q), flop_per_row * q.shape[1]):
            queries, keys, values = q[None, heads], k[None, heads], v[None, heads]
            rows: list[Tensor] = []
            for piece in self._pieces(q.shape[1], flop_per_row * keys.shape[1]):
                rows.append(F.scaled_dot_product_attention(queries[:, :, piece], keys, values)[0])
                self._after_block()
            out.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _pieces(self, count: int, flop_each: float) -> Iterator[slice]:
        step = max(1, int(self._most_flop / flop_each))
        return (slice(start, start + step) for start in range(0, count, step))
