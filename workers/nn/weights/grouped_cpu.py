"""What multiplies by a weight of `grouped.py` on a CPU with AVX2.

    a few rows    kernels that read the weight as it is (`workers/nn/native/grouped_rows.py`)
    more          the weight is made dense, a part at a time, for torch's product

Of float16, which has no kernels, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.grouped_rows import grouped_versions, multiply, widen
from workers.nn.weights.base import Activations
from workers.nn.weights.grouped import TILE_NUMBERS, GroupedWeight, NumberKind

# Rows, up to which the kernels are faster than a dense product and what it needs first.
FEW, FEW_QUANTIZED = 16, 64


class CpuProduct:
    def __init__(self, weight: GroupedWeight, activations: Activations) -> None:
        """Raises ValueError for activations in 8 bits and a weight in FP8."""
        if activations is Activations.INT8 and weight.kind is NumberKind.FP8:
            raise ValueError("activations are in 8 bits, but weights in FP8 have no kernel for these")
        self._weight, self._activations = weight, activations
        self._kernel = grouped_versions()[-1]

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x Wᵀ + bias + residual [rows, out], of x [rows, in]."""
        if x.dtype not in operators.IS_HALF:
            wide = (None if part is None else part.float() for part in (bias, residual))
            return self(x.float(), *wide).to(x.dtype)
        is_quantized = self.is_quantized(x.dtype)
        if len(x) <= (FEW_QUANTIZED if is_quantized else FEW):
            return multiply(self._kernel, self._weight, x, bias, residual, is_quantized)
        out = self._multiply_dense(x)
        if bias is not None:
            out.add_(bias)
        return out if residual is None else out.add_(residual)

    def is_quantized(self, dtype: torch.dtype) -> bool:
        """Whether a few rows of this type are. Many are not: that would take longer."""
        if self._weight.kind is NumberKind.FP8 or self._activations is Activations.NONE:
            return False
        return self._activations is Activations.INT8 or dtype is torch.bfloat16

    def _multiply_dense(self, x: Tensor) -> Tensor:
        weight, x = self._weight, self._weight.ordered(x)
        out = x.new_empty(len(x), weight.out_features)
        step = min(weight.out_features, max(1, TILE_NUMBERS // weight.num_inputs))
        room = x.new_empty(step, weight.num_inputs)
        for start in range(0, weight.out_features, step):
            part = slice(start, min(start + step, weight.out_features))
            dense = room[: part.stop - start]
            widen(self._kernel, weight, part, dense)
            torch.mm(x, dense.t(), out=out[:, part])
        return out


def make_cpu_product(weight: GroupedWeight, activations: Activations) -> CpuProduct | None:
    """None where this processor has no kernels. Raises ValueError for activations in 8 bits that it cannot
    multiply."""
    if grouped_versions():
        return CpuProduct(weight, activations)
    if activations is Activations.INT8:
        raise ValueError("activations in 8 bits need the compiled kernels, and a processor with AVX2")
    return None
