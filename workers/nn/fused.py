"""Fused operators of a decoder, where there are kernels for them (`workers/nn/kernels.py`).

That file needs Triton; this one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Kernels(NamedTuple):
    # (x, delta, weight, eps): x += delta, then the norm of x.
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    # silu(gate) · up of [rows, 2 · size], gate first.
    silu_mul: Callable[[Tensor], Tensor]
    # (x, gate_up, down, chosen, shares, first): as `Experts`, with experts `first`, `first` + 1, … in the
    # stacked weights gate_up [num_held, 2 · intermediate, hidden] and down [num_held, hidden, intermediate].
    experts: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor]
