"""Where oneDNN has put the numbers of a weight that it has packed."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKED = 2  # kind of a layout, in oneDNN's descriptions of memory
DTYPES = {2: torch.bfloat16}
# Places in oneDNN's `dnnl_memory_desc` as 32-bit numbers; sizes, strides and blocks have 64 bits.
NDIMS, DIMS, DTYPE, KIND, STRIDES, NUM_BLOCKS, BLOCKS, BLOCK_DIMS = 1, 2, 26, 78, 80, 104, 106, 130


class PackedMatrix(NamedTuple):
    """Blocks within blocks: `blocks` are the sizes of the innermost ones, of the dimensions `block_dims`;
    `strides` those of the outermost ones, in numbers."""

    address: int
    dtype: torch.dtype
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    blocks: tuple[int, ...]
    block_dims: tuple[int, ...]


def read_layout(packed: Tensor) -> PackedMatrix | None:
    """Of a matrix in oneDNN's memory, valid as long as it lives; None for what this file does not know.

    Raises RuntimeError or struct.error where this build of torch describes none.
    """
    description = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())

    def short(place: int) -> int:
        return int(struct.unpack_from("<i", description, 4 * place)[0])

    def long(place: int, count: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{count}q", description, 4 * place)

    (count,) = long(NUM_BLOCKS, 1)
    if (short(NDIMS), short(KIND)) != (2, BLOCKED) or not 0 < count <= 4 or short(DTYPE) not in DTYPES:
        return None
    return PackedMatrix(
        torch.ops.mkldnn.data_ptr(packed), DTYPES[short(DTYPE)], long(DIMS, 2), long(STRIDES, 2),
        long(BLOCKS, count), long(BLOCK_DIMS, count),
    )  # fmt: skip


def can_read_layouts() -> bool:
    return hasattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md") and hasattr(torch.ops.mkldnn, "data_ptr")
