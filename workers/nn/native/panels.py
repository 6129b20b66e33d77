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

from workers.nn.native.huge_pages import collapse
from workers.nn.native.operators import kernels

FEW = 1  # rows; for more oneDNN is faster, with AMX at least
BF16, BLOCKED = 2, 2  # in oneDNN's descriptions of memory
# Places in oneDNN's `dnnl_memory_desc` as 32-bit numbers; sizes, strides and blocks have 64 bits.
NDIMS, DIMS, DTYPE, KIND, STRIDES, NUM_BLOCKS, BLOCKS, BLOCK_DIMS = 1, 2, 26, 78, 80, 104, 106, 130
OUT, IN = 0, 1  # dimensions of a weight


class Panels(NamedTuple):
    """A weight [out, in] in bfloat16: panels of outputs; within a panel pairs of inputs, and for each pair
    the outputs side by side."""

    address: int
    out_features: int
    in_features: int
    vectors: int  # of 16 outputs in a panel
    panel_bytes: int

    def multiply(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """x [rows, in] · Wᵀ + bias + residual: [rows, out] in bfloat16."""
        assert kernels is not None
        out = x.new_empty((len(x), self.out_features))
        kernels.few_rows(
            out.data_ptr(), x.data_ptr(), self.address, 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), len(x), self.in_features, self.out_features,
            self.vectors, self.panel_bytes,
        )  # fmt: skip
        return out


def panels_of(packed: Tensor) -> Panels | None:
    """Of a weight in bfloat16 packed by `mkldnn._reorder_linear_weight`, valid as long as it lives. None
    where this processor has no kernel for the layout."""
    if packed.dtype is not torch.bfloat16 or not _is_readable():
        return None
    panels = _read(packed)
    if panels is not None:
        collapse(panels.address, torch.ops.mkldnn._nbytes(packed))
    return panels


def _read(packed: Tensor) -> Panels | None:
    description = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())

    def short(place: int) -> int:
        return int(struct.unpack_from("<i", description, 4 * place)[0])

    def long(place: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", description, 4 * place)

    if (short(NDIMS), short(DTYPE), short(KIND)) != (2, BF16, BLOCKED):
        return None
    out_features, in_features = long(DIMS, 2)
    (count,) = long(NUM_BLOCKS, 1)
    blocks, dims, strides = long(BLOCKS, 3)[:count], long(BLOCK_DIMS, 3)[:count], long(STRIDES, 2)
    if (count, dims) == (3, (IN, OUT, IN)):
        pairs, outputs, two = blocks
    elif (count, dims) == (2, (OUT, IN)):
        pairs, (outputs, two) = 1, blocks
    else:
        return None
    is_in_order = two == 2 and strides[IN] == pairs * outputs * two and strides[OUT] >= strides[IN]
    if not is_in_order or outputs % 16 or in_features % 2:
        return None
    address = torch.ops.mkldnn.data_ptr(packed)
    return Panels(address, out_features, in_features, outputs // 16, 2 * strides[OUT])


@functools.cache
def _is_readable() -> bool:
    """Whether a product with a packed weight is right: a later oneDNN may describe its memory in another
    way."""
    if kernels is None or not hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md"):
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
