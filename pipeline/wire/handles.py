"""Handles to tensors in the memory of another process.

`pipeline/transport` manages the memory itself.
"""

from __future__ import annotations

import msgspec
import numpy as np

ITEM_SIZES = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4}


class TensorHandle(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A tensor in somebody's pool: about 35 bytes on the wire."""

    pool_id: str
    epoch: int
    slot: int
    generation: int
    offset: int  # bytes from the start of the pool
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_SIZES[self.dtype]


class PoolInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that a consumer needs to map a pool.

    Travels on ipc edges only: the handle gives access to the memory.
    """

    pool_id: str
    epoch: int
    kind: str  # "host" or "cuda_ipc"
    nbytes: int
    max_slots: int
    pid: int
    table_fd: int  # memory file of the generation table: int64 [max_slots]
    pattern: bytes  # stands in memory directly behind the `nbytes`
    memory_fd: int = -1  # host
    ipc_handle: bytes = b""  # cuda_ipc: 64 bytes
    device_uuid: str = ""  # cuda_ipc: ordinals differ between processes
