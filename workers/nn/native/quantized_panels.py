"""Rows, quantised to 8 bits, times a weight in int8 or int4 (`int4.py`).

Three kernels read the same panels: for AVX2 and AVX512-VNNI, at the memory's rate for a few rows, and for
AMX-INT8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.huge_pages import advise

FEW = 2  # rows; for more AMX is faster
OUTPUTS, BLOCK = 64, 64  # outputs of a panel; inputs that it is padded to
PART = 16 * OUTPUTS  # outputs that are quantised at a time: wide copies of a whole output layer are large


class QuantizedPanels(NamedTuple):
    """A weight [out, in]: panels of 64 outputs; within a panel four inputs at a time, and for each four the
    outputs side by side."""

    numbers: Tensor  # [panels, …], one byte each
    in_features: int
    out_features: int
    bits: int
    sums: Tensor  # [out] int32, of each output's weights
    scales: Tensor  # [out] float32
    few: str  # the kernel for up to FEW rows
    many: str  # that for more

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [rows, in] · Wᵀ + bias + residual: [rows, out], all in the type of x. Each row
        is quantised with a scale of its own."""
        kernels, rows = operators.kernels, len(x)
        assert kernels is not None
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        out = x.new_empty((rows, self.out_features))
        if not rows:
            return out
        # Whole pairs of tiles of 16 rows, and whole lines of a cache.
        padded_rows, padded_in = -(-rows // 32) * 32, -(-self.in_features // BLOCK) * BLOCK
        panels = max(torch.get_num_threads() * OUTPUTS, padded_rows // 8) * padded_in if self.bits == 4 else 0
        scratch = torch.empty(padded_rows * (padded_in + 4) + panels, dtype=torch.uint8)
        place = scratch.data_ptr()
        row_scales = place + padded_rows * padded_in
        kernels.quantized_rows(
            self.few if rows <= FEW else self.many,
            out.data_ptr(), x.data_ptr(), self.numbers.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), self.sums.data_ptr(), self.scales.data_ptr(),
            place, row_scales, row_scales + 4 * padded_rows, rows, self.in_features, self.out_features,
            self.numbers.stride(0), self.bits, operators.IS_HALF[x.dtype],
        )  # fmt: skip
        return out


def quantized_kernels() -> tuple[str, ...]:
    """Of this processor, the slowest first: `avx2`, `vnni`, `amx`."""
    return () if operators.kernels is None else tuple(operators.kernels.quantized_versions())


def make_panels(
    numbers: Tensor, in_features: int, bits: int, sums: Tensor, scales: Tensor
) -> QuantizedPanels:
    """With the fastest kernels of this processor: AMX has none for a few rows."""
    found = quantized_kernels()
    few = next(name for name in reversed(found) if name != "amx")
    return QuantizedPanels(numbers, in_features, len(scales), bits, sums, scales, few, found[-1])


def pack_int8(weight: Tensor) -> QuantizedPanels:
    """Of a weight [out, in] in float32 or bfloat16, with a scale for each output."""
    out_features, in_features = weight.shape
    blocks = -(-in_features // BLOCK)
    numbers = torch.empty(-(-out_features // OUTPUTS), blocks, BLOCK // 4, OUTPUTS, 4, dtype=torch.int8)
    advise(numbers.data_ptr(), numbers.numel())
    sums, scales = torch.empty(out_features, dtype=torch.int32), torch.empty(out_features)
    parts = zip(
        weight.split(PART), numbers.split(PART // OUTPUTS), sums.split(PART), scales.split(PART), strict=True
    )
    for part, panels, of_part, scale in parts:
        wide = part.float()
        torch.div(wide.abs().amax(dim=1).clamp_(min=1e-8), 127, out=scale)
        whole = (wide / scale[:, None]).round_().to(torch.int8)
        torch.sum(whole, dim=1, dtype=torch.int32, out=of_part)
        whole = F.pad(whole, (0, -in_features % BLOCK, 0, -len(part) % OUTPUTS))
        panels.copy_(whole.view(len(panels), OUTPUTS, blocks, BLOCK // 4, 4).permute(0, 2, 3, 1, 4))
    return make_panels(numbers, in_features, 8, sums, scales)
