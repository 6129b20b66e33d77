"""What ranks do when one of them cannot map a ViT's pool, in two processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import PoolMap, StaleHandleError, TensorPool
from pipeline.wire.errors import PipelineError
from pipeline.wire.handles import PoolInfo, TensorHandle
from workers.llm.embedding_pools import EmbeddingPools
from workers.llm.parallel import TensorParallel

CPU = torch.device("cpu")


class NoPeer(PoolMap):
    def open(self, info: PoolInfo) -> None:
        raise PipelineError("no peer access")


def lend(values: torch.Tensor) -> tuple[TensorPool, TensorHandle]:
    pool, slots = TensorPool.on_host("vit.0", 3, 1 << 16, 4), SlotAllocator(1 << 16, 1 << 12, 4)
    slot = slots.allocate(1 << 12)
    assert slot is not None
    handle = pool.lend(slot, tuple(values.shape), "float32")
    pool.tensor(handle).copy_(values)
    return pool, handle


def rank(number: int, blind: int, rendezvous: str, info: PoolInfo, handle: TensorHandle) -> None:
    parallel = TensorParallel.connect(number, 2, CPU, Path(rendezvous))
    pools = EmbeddingPools(NoPeer() if number == blind else PoolMap(), parallel)
    assert not pools.knows("vit.0", 3)
    pools.open(info)
    assert pools.knows("vit.0", 3)
    assert not pools.knows("vit.0", 4)
    x = torch.zeros(5, 4)
    pools.gather(x[1:3], handle, 1)
    assert x.tolist() == [[0.0] * 4, [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0], [0.0] * 4, [0.0] * 4]
    parallel.close()


def rank_beside_each_blind_one(number: int, folder: str, info: PoolInfo, handle: TensorHandle) -> None:
    for blind in (-1, 0, 1):
        rank(number, blind, f"{folder}/ranks{blind}", info, handle)


def test_a_rank_that_can_read_hands_the_rows_on(tmp_path: Path) -> None:
    pool, handle = lend(torch.arange(12.0).view(3, 4))
    mp.spawn(rank_beside_each_blind_one, (str(tmp_path), pool.info, handle), nprocs=2)
    pool.close()


def test_when_no_rank_can_read_it_is_said() -> None:
    pool, _ = lend(torch.zeros(3, 4))
    pools = EmbeddingPools(NoPeer(), TensorParallel())
    with pytest.raises(PipelineError, match=r"vit.0 cannot be read \(no peer access\)"):
        pools.open(pool.info)
    assert not pools.knows("vit.0", 3)
    pool.close()


@pytest.mark.parametrize(("shape", "start"), [((2, 4), 2), ((1, 4), -1), ((1, 5), 0)])
def test_rows_that_are_not_there_are_refused(shape: tuple[int, int], start: int) -> None:
    pool, handle = lend(torch.zeros(3, 4))
    pools = EmbeddingPools(PoolMap(), TensorParallel())
    pools.open(pool.info)
    with pytest.raises(StaleHandleError, match="are not in it"):
        pools.gather(torch.zeros(shape), handle, start)
    pool.close()


def test_a_mapping_in_which_the_pattern_is_not_found_is_refused() -> None:
    pool, _ = lend(torch.zeros(3, 4))
    pool.memory.write(pool.info.nbytes, b"\0" * 8)
    with pytest.raises(PipelineError, match="what its owner wrote is not in it"):
        PoolMap().open(pool.info)
    pool.close()
