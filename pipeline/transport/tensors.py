"""Tensors shared by two processes: the producer writes a pool, consumers read in place through handles.

A `TensorPool` is one block, allocated at start and announced once; a `TensorHandle`
(`pipeline/wire/handles.py`) names a part of it. A consumer maps the pool when it is announced; after that,
opening a handle is pointer arithmetic. Kinds of memory:

- `host`: an anonymous memory file, mapped through its owner's descriptor, so that a crash leaves no file.
- `cuda_ipc`: one `cudaMalloc` block, outside torch's allocator, mapped by its IPC handle on the same GPU or
  from a peer GPU.

Behind the slots lies a random pattern, which a consumer compares at once: some drivers map without an error
and without the data. A table of slot generations in host memory marks handles that outlived their slots:
these are refused, never read. In `pipeline/` only this file and `memory.py` use torch, and only for tensors.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.transport.memory import (
    CudaBindings,
    CudaMemory,
    CudaRuntime,
    HostMemory,
    LockedMemory,
    Memory,
    create_memory_file,
)
from pipeline.transport.slots import Slot
from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import ITEM_SIZES, PoolInfo, TensorHandle

if TYPE_CHECKING:
    import torch

# a smaller cudaMalloc may share its 2 MiB with another allocation, which would be exported too
CUDA_GRANULE = 2 << 20
PATTERN_BYTES = 64
NO_GENERATION = 0  # the first is 1


class StaleHandleError(PipelineError):
    """A handle of a dead epoch, of bytes that were allocated again, or outside its pool."""


class PoolGoneError(PipelineError):
    """The process that announced a pool has died since."""


class TensorPool:
    """The producer's side. `info` is to be announced once; `slots.py` allocates the slots."""

    def __init__(self, info: PoolInfo, memory: Memory) -> None:
        self.info = info
        self.memory = memory
        memory.write(info.nbytes, info.pattern)
        self._table_memory = HostMemory(info.table_fd, 8 * info.max_slots)
        self._table = self._table_memory.array(0, (info.max_slots,), "int64")
        # What the latest generation of each slot has, or had: first byte, and first byte behind it.
        self._starts, self._stops = np.zeros((2, info.max_slots), np.int64)

    @classmethod
    def on_host(cls, pool_id: str, epoch: int, nbytes: int, max_slots: int) -> TensorPool:
        memory_fd = create_memory_file(pool_id, nbytes + PATTERN_BYTES)
        table_fd = create_memory_file(f"{pool_id}-table", 8 * max_slots)
        info = PoolInfo(
            pool_id,
            epoch,
            "host",
            nbytes,
            max_slots,
            os.getpid(),
            table_fd,
            secrets.token_bytes(PATTERN_BYTES),
            memory_fd,
        )
        return cls(info, HostMemory(memory_fd, nbytes + PATTERN_BYTES))

    @classmethod
    def on_cuda(
        cls, pool_id: str, epoch: int, nbytes: int, max_slots: int, device: int, runtime: CudaRuntime
    ) -> TensorPool:
        """Raises PipelineError where the GPU has too little memory, or gives no IPC handle."""
        nbytes = (nbytes + PATTERN_BYTES + CUDA_GRANULE - 1) // CUDA_GRANULE * CUDA_GRANULE - PATTERN_BYTES
        pointer = runtime.malloc(device, nbytes + PATTERN_BYTES)
        try:
            handle = runtime.get_ipc_handle(pointer)
        except PipelineError:
            runtime.free(pointer)
            raise
        table_fd = create_memory_file(f"{pool_id}-table", 8 * max_slots)
        info = PoolInfo(
            pool_id, epoch, "cuda_ipc", nbytes, max_slots, os.getpid(), table_fd,
            secrets.token_bytes(PATTERN_BYTES),
            ipc_handle=handle, device_uuid=runtime.device_uuid(device),
        )  # fmt: skip
        return cls(info, CudaMemory(runtime, device, pointer, owned=True))

    def lend(self, slot: Slot, shape: tuple[int, ...], dtype: str) -> TensorHandle:
        """A handle for a slot. With the first of a generation all handles of earlier tensors in its bytes
        become stale, whatever the numbers of their slots."""
        handle = TensorHandle(
            self.info.pool_id, self.info.epoch, slot.number, slot.generation, slot.offset, shape, dtype
        )
        if handle.nbytes > slot.nbytes:
            raise ValueError(f"a tensor of {handle.nbytes} bytes does not fit a slot of {slot.nbytes}")
        if self._table[slot.number] != slot.generation:
            stop = slot.offset + slot.nbytes
            self._table[(self._starts < stop) & (self._stops > slot.offset)] = NO_GENERATION
            self._starts[slot.number], self._stops[slot.number] = slot.offset, stop
            self._table[slot.number] = slot.generation
        return handle

    def array(self, handle: TensorHandle) -> npt.NDArray[Any]:
        """The memory of a handle in a host pool, as a numpy array."""
        assert isinstance(self.memory, HostMemory)
        return self.memory.array(handle.offset, handle.shape, handle.dtype)

    def tensor(self, handle: TensorHandle) -> torch.Tensor:
        return self.memory.tensor(handle.offset, handle.shape, handle.dtype)

    def write(self, handle: TensorHandle, start: int, data: bytes | memoryview) -> None:
        """Writes bytes of a tensor from `start` on. Raises ValueError for bytes beyond its end."""
        if not 0 <= start <= start + len(data) <= handle.nbytes:
            raise ValueError(f"{len(data)} bytes from {start} on do not fit a tensor of {handle.nbytes}")
        self.memory.write(handle.offset + start, data)

    def close(self) -> None:
        self.memory.close()
        del self._table
        self._table_memory.close()
        os.close(self.info.table_fd)
        if self.info.memory_fd >= 0:
            os.close(self.info.memory_fd)


class _Mapping:
    def __init__(self, info: PoolInfo, memory: Memory, table: HostMemory) -> None:
        self.info, self.memory, self.table_memory = info, memory, table
        self.table = table.array(0, (info.max_slots,), "int64")


class PoolMap:
    """The consumer's side: the pools of all producers, each mapped once, for the GPU `device` if any."""

    def __init__(self, device: int | None = None, runtime: CudaRuntime | None = None) -> None:
        self._runtime, self._device = runtime, device
        self._mappings: dict[str, _Mapping] = {}

    def open(self, info: PoolInfo) -> None:
        """Maps an announced pool; a pool of an earlier epoch with the same id is closed first.

        Raises PipelineError where it cannot be mapped or its pattern differs; PoolGoneError when its owner
        has died.
        """
        self.close(info.pool_id)
        try:
            self._open(info)
        except (PipelineError, OSError) as error:
            if is_dead(info.pid):
                raise PoolGoneError(f"the owner of pool {info.pool_id} has died") from error
            raise

    def _open(self, info: PoolInfo) -> None:
        memory = self._map(info)
        if memory.read(info.nbytes, PATTERN_BYTES) != info.pattern:
            memory.close()
            raise PipelineError(f"pool {info.pool_id} was mapped, but what its owner wrote is not in it")
        self._mappings[info.pool_id] = _Mapping(
            info, memory, _map_peer(info.pid, info.table_fd, 8 * info.max_slots)
        )

    def _map(self, info: PoolInfo) -> Memory:
        if self._device is not None and self._runtime is None:
            self._runtime = CudaBindings()
        match info.kind:
            case "host":
                return _map_peer(info.pid, info.memory_fd, info.nbytes + PATTERN_BYTES, self._runtime)
            case "cuda_ipc":
                if self._device is None or self._runtime is None:
                    raise PipelineError(f"pool {info.pool_id} is on a GPU, but this process uses none")
                return CudaMemory(
                    self._runtime,
                    self._device,
                    self._runtime.open_ipc_handle(self._device, info.ipc_handle),
                    owned=False,
                )
            case kind:
                raise PipelineError(f"pool {info.pool_id} has the unknown kind {kind!r}")

    def knows(self, pool_id: str, epoch: int) -> bool:
        mapping = self._mappings.get(pool_id)
        return mapping is not None and mapping.info.epoch >= epoch

    def addresses(self, pool_id: str, epoch: int) -> tuple[int, int] | None:
        """Of the pool's memory and of its table of generations, in this process. None if it is not mapped, or
        not on the host."""
        mapping = self._mappings.get(pool_id)
        if mapping is None or mapping.info.epoch != epoch or not isinstance(mapping.memory, HostMemory):
            return None
        return mapping.memory.address, mapping.table_memory.address

    def tensor(self, handle: TensorHandle) -> torch.Tensor:
        """The tensor in place.

        Raises StaleHandleError if the handle's epoch, generation or extent is not the pool's.
        """
        return self._find(handle).memory.tensor(handle.offset, handle.shape, handle.dtype)

    def copy_rows(self, out: torch.Tensor, handle: TensorHandle, start: int) -> None:
        """Fills the contiguous `out` with rows of a matrix from `start` on, in order with its stream.

        Raises as `tensor` does.
        """
        memory = self._find(handle).memory
        row_bytes = handle.nbytes // max(1, handle.shape[0])
        is_row = (tuple(out.shape[1:]), str(out.dtype)) == (handle.shape[1:], f"torch.{handle.dtype}")
        if not is_row or start < 0 or start + len(out) > handle.shape[0]:
            raise StaleHandleError(
                f"{handle}: rows {start} to {start + len(out)} as {tuple(out.shape)} of {out.dtype} are not "
                "in it"
            )
        memory.copy_to(out, handle.offset + start * row_bytes)

    def read(self, handle: TensorHandle, start: int, nbytes: int) -> bytes:
        """A copy of bytes of the tensor from `start` on. Raises as `tensor` does, also where the slot was
        allocated again while it was read."""
        data = self._find(handle).memory.read(handle.offset + start, min(nbytes, handle.nbytes - start))
        self._find(handle)
        return data

    def _find(self, handle: TensorHandle) -> _Mapping:
        mapping = self._mappings.get(handle.pool_id)
        if mapping is None:
            raise StaleHandleError(f"{handle}: no pool of that name is open")
        info = mapping.info
        if handle.epoch != info.epoch:
            raise StaleHandleError(f"{handle}: the pool is at epoch {info.epoch}")
        if (
            not 0 <= handle.slot < info.max_slots
            or handle.dtype not in ITEM_SIZES
            or min(handle.shape, default=1) < 0
        ):
            raise StaleHandleError(f"{handle}: no such slot, shape or dtype")
        if handle.offset < 0 or handle.offset + handle.nbytes > info.nbytes:
            raise StaleHandleError(f"{handle}: outside the pool of {info.nbytes} bytes")
        if (generation := int(mapping.table[handle.slot])) != handle.generation:
            raise StaleHandleError(f"{handle}: the slot is at generation {generation}")
        return mapping

    def close(self, pool_id: str) -> None:
        if (mapping := self._mappings.pop(pool_id, None)) is not None:
            mapping.memory.close()
            del mapping.table
            mapping.table_memory.close()


def is_dead(pid: int) -> bool:
    """Whether a process of this PID namespace has ended, be it reaped or not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def _map_peer(pid: int, fd: int, nbytes: int, runtime: CudaRuntime | None = None) -> HostMemory:
    """Maps another process's memory file through /proc, which needs the same user and PID namespace.

    Page-locked where there is a GPU.
    """
    opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        if (size := os.fstat(opened).st_size) < nbytes:
            raise PipelineError(
                f"the memory file {fd} of process {pid} has {size} bytes, announced were {nbytes}"
            )
        return HostMemory(opened, nbytes) if runtime is None else LockedMemory(opened, nbytes, runtime)
    finally:
        os.close(opened)  # the mapping keeps the file alive
