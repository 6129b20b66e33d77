"""What a forward owes to others while it runs: signs of life, and turns on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from workers.vit.blocks import Blocks


class Pace:
    """A tower calls `after_layer` once a layer, and computes packed rows by way of `rows` and `attend`.

    With `blocks` these are computed in pieces of bounded work, and signs of life follow the work.
    """

    def __init__(self, after_layer: Callable[[], None] | None = None, blocks: Blocks | None = None) -> None:
        self._after_layer, self._blocks = after_layer, blocks

    def after_layer(self) -> None:
        if self._after_layer is not None:
            self._after_layer()

    def rows(
        self, function: Callable[..., tuple[Tensor, ...]], flop_per_row: float, *inputs: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What `function` makes of inputs [num_rows, …], each [num_rows, …]; no row depends on another."""
        if self._blocks is None:
            return function(*inputs)
        return self._blocks.rows(function, flop_per_row, *inputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [heads, num_rows, head_dim] within one segment."""
        if self._blocks is None:
            return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        return self._blocks.attend(q, k, v)


UNPACED = Pace()
