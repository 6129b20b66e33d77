"""What multiplies by a weight of `grouped.py` on a CPU with AVX2.

    a few rows           kernels that read the weight as it is (`workers/nn/native/grouped_rows.py`)
    more, in bfloat16    the same for AMX, which multiplies x as it is
    more                 kernels for x in 8 bits; else a part of the weight is made dense for torch's product

Of float16, which has no kernels, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.grouped_rows import TILES, grouped_versions, multiply, widen
from workers.nn.native.huge_pages import collapse
from workers.nn.weights.base import Activations
from workers.nn.weights.grouped import TILE_NUMBERS, GroupedWeight, NumberKind

# Rows, up to which the kernels are faster than a dense product and what it needs first. In float32; and in
# bfloat16, where the processor multiplies these in one instruction, or in tiles.
FEW = {NumberKind.INT4: 48, NumberKind.INT8: 48, NumberKind.FP8: 32}
FEW_HALF = 16
FEW_BESIDE_TILES = {True: 10, False: 5}  # by whether they have 8 bits; with AMX


class CpuProduct:
    def __init__(self, weight: GroupedWeight, activations: Activations) -> None:
        """Raises ValueError for activations in 8 bits and a weight in FP8."""
        if activations is Activations.INT8 and weight.kind is NumberKind.FP8:
            raise ValueError("activations are in 8 bits, but weights in FP8 have no kernel for these")
        self._weight, self._activations = weight, activations
        *_, self._kernel = (name for name in grouped_versions() if name != TILES)
        self._has_tiles = TILES in grouped_versions()
        collapse(weight.numbers.data_ptr(), weight.numbers.numel() * weight.numbers.itemsize)
        self._half = operators.kernels.rows_versions()  # what this processor has for products in bfloat16

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x Wᵀ + bias + residual [rows, out], of x [rows, in]."""
        if x.dtype not in operators.IS_HALF:
            wide = (None if part is None else part.float() for part in (bias, residual))
            return self(x.float(), *wide).to(x.dtype)
        is_quantized = self.is_quantized(x.dtype)
        has_tiles = self._has_tiles and x.dtype is torch.bfloat16
        if has_tiles and len(x) > FEW_BESIDE_TILES[is_quantized]:
            return multiply(TILES, self._weight, x, bias, residual, is_quantized=False)
        if is_quantized or len(x) <= self._few(x.dtype):
            return multiply(self._kernel, self._weight, x, bias, residual, is_quantized)
        out = self.multiply_dense(x)
        if bias is not None:
            out.add_(bias)
        return out if residual is None else out.add_(residual)

    def is_quantized(self, dtype: torch.dtype) -> bool:
        """Whether rows of this type are, as long as they are few."""
        if self._weight.kind is NumberKind.FP8 or self._activations is Activations.NONE:
            return False
        return self._activations is Activations.INT8 or dtype is torch.bfloat16

    def _few(self, dtype: torch.dtype) -> int:
        return FEW_HALF if dtype is torch.bfloat16 and self._half else FEW[self._weight.kind]

    def multiply_dense(self, x: Tensor) -> Tensor:
        """x Wᵀ, by dense parts of the weight."""
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
