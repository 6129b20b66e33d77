"""Callbacks during a forward: they report progress, and let other processes use the device in between."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import row_attention
from workers.vit.blocks import Blocks


class Pace:
    """A tower calls `after_layer` after each layer, and computes packed rows through `rows` and `attend`.

    With `blocks` these compute in blocks of bounded work, with a callback after each.
    """

    def __init__(self, after_layer: Callable[[], None] | None = None, blocks: Blocks | None = None) -> None:
        self._after_layer, self._blocks = after_layer, blocks

    def after_layer(self) -> None:
        if self._after_layer is not None:
            self._after_layer()

    def rows(
        self, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`function(*inputs)` by rows: inputs and results are [num_rows, …], and rows are independent."""
        if self._blocks is None:
            return function(*inputs)
        return self._blocks.rows(function, flop_per_row, *inputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [segments, heads, num_rows, head_dim] within each segment."""
        if self._blocks is not None:
            return self._blocks.attend(q, k, v)
        if row_attention.takes(q, k, v):
            out = torch.empty_like(q)
            if row_attention.attend_within(q, k, v, out):
                return out
        return F.scaled_dot_product_attention(q, k, v)


UNPACED = Pace()
