"""Pools on the host across real processes, the handles' checks, and the bookkeeping of the CUDA kind with a
fake runtime."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pipeline.transport.memory import CudaBindings, HostMemory
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import (
    CUDA_GRANULE,
    PATTERN_BYTES,
    PoolMap,
    StaleHandleError,
    TensorPool,
)
from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import TensorHandle

READER = """
import sys, msgspec
from pipeline.wire.handles import PoolInfo, TensorHandle
from pipeline.transport.tensors import PoolMap
pools = PoolMap(0 if "cuda_ipc" in sys.argv[3:] else None)
pools.open(msgspec.msgpack.decode(bytes.fromhex(sys.argv[1]), type=PoolInfo))
tensor = pools.tensor(msgspec.msgpack.decode(bytes.fromhex(sys.argv[2]), type=TensorHandle))
tensor.mul_(2)
print(tensor.sum().item())
"""


def wire(value: object) -> str:
    return msgspec.msgpack.encode(value).hex()


def lend(pool: TensorPool, allocator: SlotAllocator, tensor: torch.Tensor) -> TensorHandle:
    slot = allocator.allocate(tensor.nbytes)
    assert slot is not None
    handle = pool.lend(slot, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    pool.tensor(handle).copy_(tensor)
    return handle


def test_another_process_reads_and_writes_in_place() -> None:
    pool, allocator = TensorPool.on_host("vit.0", 1, 1 << 20, 8), SlotAllocator(1 << 20, 1 << 16, 8)
    lend(pool, allocator, torch.ones(100))
    handle = lend(pool, allocator, torch.arange(12, dtype=torch.bfloat16).view(3, 4))
    out = subprocess.run(
        [sys.executable, "-c", READER, wire(pool.info), wire(handle)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(out.stdout) == 132.0
    assert pool.tensor(handle).tolist() == [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]]
    pool.close()


def test_a_handle_is_small() -> None:
    handle = TensorHandle("vit.3", 5, 17, 1234, 7_340_032, (1024, 1536), "bfloat16")
    assert len(msgspec.msgpack.encode(handle)) <= 40


@pytest.fixture
def lent() -> Any:
    pool, allocator = TensorPool.on_host("vit.0", 3, 1 << 20, 8), SlotAllocator(1 << 20, 1 << 16, 8)
    pools = PoolMap()
    pools.open(pool.info)
    yield pools, pool, allocator, lend(pool, allocator, torch.ones(10))
    pools.close("vit.0")
    pool.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pool_id": "vit.9"}, "no pool of that name"),
        ({"epoch": 2}, "the pool is at epoch 3"),
        ({"generation": 9}, "the slot is at generation 1"),
        ({"slot": 99}, "no such slot"),
        ({"slot": -1}, "no such slot"),
        ({"offset": (1 << 20) - 4}, "outside the pool"),
        ({"offset": -256}, "outside the pool"),
        ({"shape": (1 << 40,)}, "outside the pool"),
        ({"shape": (-5, 8)}, "no such slot, shape or dtype"),
        ({"dtype": "object"}, "no such slot, shape or dtype"),
    ],
)
def test_a_forged_or_stale_handle_is_refused_with_the_reason(
    lent: Any, changes: dict[str, Any], words: str
) -> None:
    pools, _, _, handle = lent
    assert pools.tensor(handle).sum() == 10
    with pytest.raises(StaleHandleError, match=words):
        pools.tensor(msgspec.structs.replace(handle, **changes))


def test_a_handle_is_stale_once_its_slot_has_a_new_tenant(lent: Any) -> None:
    pools, pool, allocator, handle = lent
    slot = next(iter(allocator._used.values()))
    allocator.free(slot)
    newer = lend(pool, allocator, torch.zeros(10))
    assert newer.slot == handle.slot
    with pytest.raises(StaleHandleError, match="generation 2"):
        pools.tensor(handle)
    assert pools.tensor(newer).sum() == 0


def test_a_handle_is_stale_once_its_bytes_have_a_new_tenant_under_another_number() -> None:
    pools, pool = PoolMap(), TensorPool.on_host("vit.0", 1, 1 << 12, 8)
    pools.open(pool.info)
    allocator = SlotAllocator(1 << 12, 1 << 10, 8)
    slots = [allocator.allocate(256) for _ in range(3)]
    handles = [pool.lend(slot, (64,), "float32") for slot in slots if slot is not None]
    for slot in slots[:2]:
        assert slot is not None
        allocator.free(slot)
    wide = allocator.allocate(512)
    assert wide is not None
    assert (wide.number, wide.offset) == (1, 0)
    newer = pool.lend(wide, (128,), "float32")
    with pytest.raises(StaleHandleError, match="generation 0"):
        pools.tensor(handles[0])
    assert pools.tensor(handles[2]).shape == (64,)
    assert pool.lend(wide, (128,), "float32") == newer
    assert pools.tensor(newer).shape == (128,)
    pools.close("vit.0")
    pool.close()


def test_a_successor_pool_takes_the_place_of_the_dead_one(lent: Any) -> None:
    pools, _, _, handle = lent
    successor = TensorPool.on_host("vit.0", 4, 1 << 20, 8)
    assert not pools.knows("vit.0", 4)
    pools.open(successor.info)
    assert pools.knows("vit.0", 4)
    with pytest.raises(StaleHandleError, match="epoch 4"):
        pools.tensor(handle)
    successor.close()


def test_a_pool_announced_larger_than_its_file_is_refused() -> None:
    pool = TensorPool.on_host("vit.0", 1, 4096, 8)
    with pytest.raises(Exception, match="4160 bytes, announced were 8256"):
        PoolMap().open(msgspec.structs.replace(pool.info, nbytes=8192))
    pool.close()


def test_nothing_is_left_open() -> None:
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        pool, allocator = TensorPool.on_host("vit.0", 1, 1 << 20, 8), SlotAllocator(1 << 20, 1 << 16, 8)
        pools = PoolMap()
        pools.open(pool.info)
        pools.tensor(lend(pool, allocator, torch.ones(10)))
        pools.close("vit.0")
        pool.close()
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before  # what other tests left open may end meanwhile
    with open("/proc/self/maps") as maps:
        assert "vit.0" not in maps.read()


def test_a_mapping_outlives_its_exporter() -> None:
    """A dead ViT cannot make the pages vanish under a step that reads them."""
    pool, allocator = TensorPool.on_host("vit.0", 1, 1 << 20, 8), SlotAllocator(1 << 20, 1 << 16, 8)
    pools = PoolMap()
    pools.open(pool.info)
    tensor = pools.tensor(lend(pool, allocator, torch.ones(10)))
    pool.close()
    assert tensor.sum() == 10


class FakeCuda:
    """The runtime's calls on host memory: pointers are numbers, handles name them."""

    def __init__(self) -> None:
        self.blocks: dict[int, HostMemory] = {}
        self.open: list[int] = []
        self.freed: list[int] = []
        self.locked: dict[int, int] = {}

    def malloc(self, device: int, nbytes: int) -> int:
        fd = os.memfd_create("fake")
        os.ftruncate(fd, nbytes)
        pointer = (len(self.blocks) + 1) << 32
        self.blocks[pointer] = HostMemory(fd, nbytes)
        os.close(fd)
        return pointer

    def free(self, pointer: int) -> None:
        assert pointer not in self.open, "freed while a peer has it mapped"
        self.freed.append(pointer)

    def get_ipc_handle(self, pointer: int) -> bytes:
        return pointer.to_bytes(64, "little")

    def open_ipc_handle(self, device: int, handle: bytes) -> int:
        self.open.append(int.from_bytes(handle, "little"))
        return self.open[-1]

    def close_ipc_handle(self, pointer: int) -> None:
        self.open.remove(pointer)

    def device_uuid(self, device: int) -> str:
        return f"uuid-{device}"

    def tensor(self, device: int, pointer: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        base = max(block for block in self.blocks if block <= pointer)
        return self.blocks[base].tensor(pointer - base, shape, dtype)

    def lock_pages(self, address: int, nbytes: int) -> None:
        self.locked[address] = nbytes

    def unlock_pages(self, address: int) -> None:
        del self.locked[address]

    def copy(self, out: torch.Tensor, pointer: int) -> None:
        out.copy_(self.tensor(0, pointer, tuple(out.shape), str(out.dtype).removeprefix("torch.")))

    def read(self, pointer: int, nbytes: int) -> bytes:
        return self.tensor(0, pointer, (nbytes,), "uint8").numpy().tobytes()

    def write(self, pointer: int, data: bytes) -> None:
        self.tensor(0, pointer, (len(data),), "uint8").copy_(
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
        )


def test_cuda_pool_bookkeeping() -> None:
    runtime = FakeCuda()
    pool, allocator = (
        TensorPool.on_cuda("vit.1", 1, 3 << 20, 8, 1, runtime),
        SlotAllocator(3 << 20, 1 << 16, 8),
    )
    assert pool.info.nbytes == 2 * CUDA_GRANULE - PATTERN_BYTES
    assert (pool.info.kind, pool.info.device_uuid, len(pool.info.ipc_handle)) == ("cuda_ipc", "uuid-1", 64)
    pools = PoolMap(0, runtime)
    pools.open(pool.info)
    handles = [lend(pool, allocator, torch.full((4, 8), float(n))) for n in range(3)]
    assert [pools.tensor(handle).mean().item() for handle in handles] == [0, 1, 2]
    assert len(runtime.open) == 1, "a pool is mapped once, not once a handle"
    out = torch.zeros(2, 8)
    pools.copy_rows(out, handles[2], 1)
    assert bool((out == 2).all())
    with pytest.raises(StaleHandleError, match="generation"):
        pools.tensor(msgspec.structs.replace(handles[0], generation=7))
    pools.close("vit.1")
    assert runtime.open == []
    pool.close()
    assert len(runtime.freed) == 1


def test_host_pools_are_locked_in_memory_where_there_is_a_gpu() -> None:
    runtime = FakeCuda()
    pool, allocator = TensorPool.on_host("vit.0", 1, 1 << 20, 8), SlotAllocator(1 << 20, 1 << 16, 8)
    pools = PoolMap(0, runtime)
    pools.open(pool.info)
    assert list(runtime.locked.values()) == [pool.info.nbytes + PATTERN_BYTES]
    out = torch.zeros(2, 8)
    pools.copy_rows(out, lend(pool, allocator, torch.full((4, 8), 3.0)), 2)
    assert bool((out == 3).all())
    pools.close("vit.0")
    assert runtime.locked == {}
    pool.close()


def test_a_pool_on_a_gpu_is_refused_by_who_has_none() -> None:
    runtime = FakeCuda()
    pool = TensorPool.on_cuda("vit.0", 1, 1 << 20, 8, 0, runtime)
    with pytest.raises(PipelineError, match="this process uses none"):
        PoolMap().open(pool.info)
    pool.close()


def test_a_cuda_pool_whose_exporter_died_gives_way_to_its_successor() -> None:
    """The successor's first process frees nothing: the driver did that.

    What was mapped of the dead one is closed, and never read.
    """
    runtime = FakeCuda()
    dead, allocator = (
        TensorPool.on_cuda("vit.0", 1, 3 << 20, 8, 0, runtime),
        SlotAllocator(3 << 20, 1 << 16, 8),
    )
    pools = PoolMap(0, runtime)
    pools.open(dead.info)
    old = lend(dead, allocator, torch.ones(4, 8))
    (mapped,) = runtime.open
    next_pool, next_allocator = (
        TensorPool.on_cuda("vit.0", 2, 3 << 20, 8, 0, runtime),
        SlotAllocator(3 << 20, 1 << 16, 8),
    )
    pools.open(next_pool.info)
    assert mapped not in runtime.open, "dead pages that stay mapped are still used memory"
    with pytest.raises(StaleHandleError, match="the pool is at epoch 2"):
        pools.copy_rows(torch.zeros(1, 8), old, 0)
    out = torch.zeros(4, 8)
    pools.copy_rows(out, lend(next_pool, next_allocator, torch.full((4, 8), 2.0)), 0)
    assert bool((out == 2).all())
    pools.close("vit.0")
    next_pool.close()
    assert runtime.open == []


def test_a_cuda_pool_without_a_handle_leaves_no_memory_behind() -> None:
    class NoIpc(FakeCuda):
        def get_ipc_handle(self, pointer: int) -> bytes:
            raise PipelineError("cudaIpcGetMemHandle failed: not supported")

    runtime = NoIpc()
    with pytest.raises(PipelineError, match="not supported"):
        TensorPool.on_cuda("vit.0", 1, 3 << 20, 8, 0, runtime)
    assert runtime.freed == list(runtime.blocks)


@pytest.mark.gpu
def test_cuda_pool_on_a_gpu() -> None:
    runtime = CudaBindings()
    pool, allocator = (
        TensorPool.on_cuda("vit.0", 1, 4 << 20, 8, 0, runtime),
        SlotAllocator(4 << 20, 1 << 16, 8),
    )
    handle = lend(pool, allocator, torch.arange(12, dtype=torch.float32, device="cuda").view(3, 4))
    torch.cuda.synchronize()
    out = subprocess.run(
        [sys.executable, "-c", READER, wire(pool.info), wire(handle), "cuda_ipc"],
        capture_output=True,
        text=True,
        check=True,
    )
    torch.cuda.synchronize()
    assert float(out.stdout) == 132.0
    assert np.array_equal(
        pool.tensor(handle).cpu().numpy(), 2 * np.arange(12, dtype=np.float32).reshape(3, 4)
    )
    pool.close()
