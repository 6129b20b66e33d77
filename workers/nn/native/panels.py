"""A few rows times a weight that oneDNN has packed, read at the memory's rate.

oneDNN computes large products best, and this kernel small ones: both read the same copy of the weight.
"""

from __future__ import annotations

import functools
import struct
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.nn.native import operators
from workers.nn.native.huge_pages import collapse
from workers.nn.native.packed import can_read_layouts, read_layout

FEW, FEW_BESIDE_AMX = 12, 1  # rows; for more oneDNN is faster
OUT, IN = 0, 1  # dimensions of a weight


class Panels(NamedTuple):
    """A weight [out, in] in bfloat16: panels of outputs; within a panel pairs of inputs, and for each pair
    the outputs side by side."""

    address: int
    out_features: int
    in_features: int
    vectors: int  # of 16 outputs in a panel
    panel_bytes: int
    few: int  # rows, up to which `multiply` is faster than oneDNN

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [rows, in] · Wᵀ + bias + residual: [rows, out] in bfloat16."""
        assert operators.kernels is not None
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        out = x.new_empty((len(x), self.out_features))
        operators.kernels.few_rows(
            out.data_ptr(), x.data_ptr(), self.address, 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), len(x), self.in_features, self.out_features,
            self.vectors, self.panel_bytes,
        )  # fmt: skip
        return out


def panels_of(packed: Tensor) -> Panels | None:
    """Of a weight in bfloat16 packed by `mkldnn._reorder_linear_weight`, valid as long as it lives. None
    where this processor has no kernel for the layout."""
    if operators.kernels is None or packed.dtype is not torch.bfloat16 or not _is_readable():
        return None
    panels = _read(packed)
    if panels is not None:
        collapse(panels.address, torch.ops.mkldnn._nbytes(packed))
    return panels


def _read(packed: Tensor) -> Panels | None:
    found = read_layout(packed)
    if found is None or found.dtype is not torch.bfloat16:
        return None
    blocks, strides = found.blocks, found.strides
    if found.block_dims == (IN, OUT, IN) and len(blocks) == 3:
        pairs, outputs, two = blocks
    elif found.block_dims == (OUT, IN) and len(blocks) == 2:
        pairs, (outputs, two) = 1, blocks
    else:
        return None
    out_features, in_features = found.dims
    is_in_order = two == 2 and strides[IN] == pairs * outputs * two and strides[OUT] >= strides[IN]
    if not is_in_order or outputs not in (16, 32, 48, 64) or in_features % 2:
        return None
    return Panels(found.address, out_features, in_features, outputs // 16, 2 * strides[OUT], _few())


@functools.cache
def _is_readable() -> bool:
    """Whether a product with a packed weight is right: a later oneDNN may describe its memory in another
    way."""
    kernels = operators.kernels
    if not can_read_layouts():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 130), (203, 130)))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        panels = _read(packed)
    except (RuntimeError, struct.error):
        return False
    if panels is None or not kernels.has_few_rows(panels.vectors):
        return False
    return torch.allclose(
        panels.multiply(x, None, None).float(), F.linear(x.float(), weight.float()), atol=0.1, rtol=0.02
    )


@functools.cache
def _few() -> int:
    return FEW_BESIDE_AMX if "amx_bf16" in operators.kernels.rows_versions() else FEW
