"""A few rows, quantised to 8 bits, times a weight in int8 that oneDNN has packed, at the memory's rate."""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.huge_pages import collapse
from workers.nn.native.packed import can_read_layouts, read_layout

FEW = 16  # rows; for more oneDNN is faster, with AMX at least
IN, OUT = 0, 1  # dimensions of a weight
BLOCKS, BLOCK_DIMS = (16, 64, 4), (IN, OUT, IN)  # of the only layout that there is a kernel for


class Int8Panels(NamedTuple):
    """A weight [in, out]: panels of 64 outputs; within a panel four inputs at a time, and for each four the
    outputs side by side."""

    address: int
    in_features: int
    out_features: int
    panel_bytes: int
    sums: Tensor  # [out] int32, of each output's weights
    scales: Tensor  # [out] float32

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [rows, in] · W + bias + residual: [rows, out], all in the type of x. Each row
        is quantised with a scale of its own."""
        assert operators.kernels is not None
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        out = x.new_empty((len(x), self.out_features))
        scratch = torch.empty(len(x) * (self.in_features + 3), dtype=torch.uint8)
        operators.kernels.few_rows_int8(
            out.data_ptr(), x.data_ptr(), self.address, 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), self.sums.data_ptr(), self.scales.data_ptr(),
            scratch.data_ptr(), len(x), self.in_features, self.out_features, self.panel_bytes,
            operators.IS_HALF[x.dtype],
        )  # fmt: skip
        return out


def int8_panels_of(packed: Tensor, weight: Tensor, scales: Tensor) -> Int8Panels | None:
    """Of a weight [out, in] int8 packed by `onednn.qlinear_prepack`, valid as long as that lives, with the
    scales of its outputs. None where this processor has no kernel for the layout."""
    if operators.kernels is None or not _is_readable():
        return None
    panels = _read(packed, weight, scales)
    if panels is not None:
        collapse(panels.address, torch.ops.mkldnn._nbytes(packed))
    return panels


def _read(packed: Tensor, weight: Tensor, scales: Tensor) -> Int8Panels | None:
    found = read_layout(packed)
    if found is None or (found.dtype, found.blocks, found.block_dims) != (torch.int8, BLOCKS, BLOCK_DIMS):
        return None
    if found.strides[IN] != 16 * 64 * 4 or found.strides[OUT] < found.strides[IN]:
        return None
    sums = weight.sum(dim=1, dtype=torch.int32)
    in_features, out_features = found.dims
    return Int8Panels(found.address, in_features, out_features, found.strides[OUT], sums, scales)


@functools.cache
def _is_readable() -> bool:
    """Whether a product with a packed weight is right: a later oneDNN may describe its memory in another
    way."""
    kernels = operators.kernels
    if not kernels.has_few_rows_int8() or not can_read_layouts():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (203, 130), generator=generator, dtype=torch.int8)
    x = torch.randint(-127, 128, (3, 130), generator=generator).float()
    x[:, 0] = 127.0  # so that quantising changes nothing
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        panels = _read(packed, weight, torch.ones(203))
    except (RuntimeError, struct.error):
        return False
    return panels is not None and torch.allclose(panels.multiply(x, None, None), x @ weight.float().t())
