"""Rows, quantised to 8 bits, times a weight in int8 that oneDNN has packed, or in int4 (`int4.py`).

Two kernels read the same panels: for AVX512-VNNI, at the memory's rate for a few rows, and for AMX-INT8.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.huge_pages import collapse
from workers.nn.native.packed import can_read_layouts, read_layout

FEW, ANY = 2, 1 << 62  # rows; for more than FEW AMX is faster
IN, OUT = 0, 1  # dimensions of a weight
BLOCKS, BLOCK_DIMS = (16, 64, 4), (IN, OUT, IN)  # of the only layout that there are kernels for
OUTPUTS, BLOCK = 64, 64  # outputs of a panel; inputs that it is padded to


class QuantizedPanels(NamedTuple):
    """A weight [in, out]: panels of 64 outputs; within a panel four inputs at a time, and for each four the
    outputs side by side."""

    address: int
    in_features: int
    out_features: int
    panel_bytes: int
    bits: int
    sums: Tensor  # [out] int32, of each output's weights
    scales: Tensor  # [out] float32
    few: int  # rows that the kernel for VNNI takes; for more there is AMX

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [rows, in] · W + bias + residual: [rows, out], all in the type of x. Each row
        is quantised with a scale of its own."""
        kernels, rows = operators.kernels, len(x)
        assert kernels is not None
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        out = x.new_empty((rows, self.out_features))
        if not rows:
            return out
        # Whole pairs of tiles of 16 rows, and whole lines of a cache.
        padded_rows, padded_in = -(-rows // 32) * 32, -(-self.in_features // BLOCK) * BLOCK
        panels = torch.get_num_threads() * OUTPUTS * padded_in if self.bits == 4 else 0
        scratch = torch.empty(padded_rows * (padded_in + 4) + panels, dtype=torch.uint8)
        place = scratch.data_ptr()
        row_scales = place + padded_rows * padded_in
        multiply = kernels.rows_vnni if rows <= self.few else kernels.rows_amx
        multiply(
            out.data_ptr(), x.data_ptr(), self.address, 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), self.sums.data_ptr(), self.scales.data_ptr(),
            place, row_scales, row_scales + 4 * padded_rows, rows, self.in_features, self.out_features,
            self.panel_bytes, self.bits, operators.IS_HALF[x.dtype],
        )  # fmt: skip
        return out


def quantized_kernels() -> tuple[str, ...]:
    """Of this processor: `vnni`, and `amx` with it."""
    found: tuple[str, ...] = () if operators.kernels is None else operators.kernels.quantized_kernels()
    return found


def few_rows() -> int:
    return FEW if "amx" in quantized_kernels() else ANY


def int8_panels_of(packed: Tensor, weight: Tensor, scales: Tensor) -> QuantizedPanels | None:
    """Of a weight [out, in] int8 packed by `onednn.qlinear_prepack`, valid as long as that lives, with the
    scales of its outputs. None where this processor has no kernel for the layout."""
    if not quantized_kernels() or not _is_readable():
        return None
    panels = _read(packed, weight, scales)
    if panels is not None:
        collapse(panels.address, torch.ops.mkldnn._nbytes(packed))
    return panels


def _read(packed: Tensor, weight: Tensor, scales: Tensor) -> QuantizedPanels | None:
    found = read_layout(packed)
    if found is None or (found.dtype, found.blocks, found.block_dims) != (torch.int8, BLOCKS, BLOCK_DIMS):
        return None
    in_features, out_features = found.dims
    blocks = -(-in_features // BLOCK)
    if found.strides[IN] != OUTPUTS * BLOCK or found.strides[OUT] < blocks * found.strides[IN]:
        return None
    sums = weight.sum(dim=1, dtype=torch.int32)
    return QuantizedPanels(
        found.address, in_features, out_features, found.strides[OUT], 8, sums, scales, few_rows()
    )


@functools.cache
def _is_readable() -> bool:
    """Whether a product with a packed weight is right: a later oneDNN may describe its memory in another
    way."""
    if not can_read_layouts():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (203, 130), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (FEW + 1, 130), generator=generator).float()
    x[:, 0] = 127.0  # so that quantising changes nothing
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        panels = _read(packed, weight, torch.ones(203))
    except (RuntimeError, struct.error):
        return False
    if panels is None:
        return False
    parts = [panels.multiply(part, None, None) for part in (x[:FEW], x)]
    return torch.allclose(torch.cat(parts), torch.cat([x[:FEW], x]) @ weight.float().t())
