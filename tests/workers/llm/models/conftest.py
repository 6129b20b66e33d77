from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from pipeline.transport.memory import HostMemory, create_memory_file
from workers.llm.parallel import TensorParallel
from workers.llm.shared_memory import LINE, PART_BYTES, SharedMemory

OnRanks = Callable[[int, bool, Callable[[TensorParallel], Tensor]], list[Tensor]]


@pytest.fixture
def on_ranks() -> OnRanks:
    """What each of `size` ranks computes; they are threads of this process."""

    def compute(size: int, has_whole_experts: bool, run: Callable[[TensorParallel], Tensor]) -> list[Tensor]:
        nbytes = size * LINE + 2 * size * PART_BYTES
        fd = create_memory_file("ranks", nbytes)
        ranks = [TensorParallel(rank, size, torch.device("cpu"), has_whole_experts) for rank in range(size)]
        for rank, one in enumerate(ranks):
            one._shared = SharedMemory(rank, [os.getpid()] * size, HostMemory(fd, nbytes))
        os.close(fd)
        try:
            with ThreadPoolExecutor(size) as threads:
                return list(threads.map(run, ranks))
        finally:
            for one in ranks:
                one.close()

    return compute
