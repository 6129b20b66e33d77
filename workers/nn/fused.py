"""The operators that a decoder takes fused, where there are kernels for them.

`workers/nn/kernels.py` has them; it needs Triton, this file does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Kernels(NamedTuple):
    # (x, delta, weight, eps): the norm of x + delta, which x becomes.
    add_rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]
    # silu(gate) · up of [rows, 2 · size], gate first.
    silu_mul: Callable[[Tensor], Tensor]
