"""What multiplies by a weight of `grouped.py` on a GPU.

    FP8 in groups of 128, many rows of bfloat16: torch's scaled product, where the device has it (`scaled.py`)
    all else: Triton (`workers/nn/grouped_kernels.py`)

Chosen when a layer is made, and by the number of rows: no step waits for the GPU, so that a CUDA graph can
hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.grouped_kernels import FEW_ROWS, grouped_linear
from workers.nn.weights.grouped import GroupedWeight
from workers.nn.weights.scaled import ScaledProduct, make_scaled_product


class CudaProduct:
    def __init__(self, weight: GroupedWeight, scaled: ScaledProduct | None) -> None:
        self._weight, self._scaled = weight, scaled

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x Wᵀ + bias + residual [rows, out], of x [rows, in]."""
        if self._scaled is not None and len(x) > FEW_ROWS and x.dtype == torch.bfloat16:
            return self._scaled(x, bias, residual)
        return grouped_linear(x, self._weight, bias, residual)


def make_cuda_product(weight: GroupedWeight, may_round: bool = True) -> CudaProduct:
    """`may_round`: whether activations may be rounded to 8 bits, as the scaled product does."""
    return CudaProduct(weight, make_scaled_product(weight) if may_round else None)
