from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.transport.memory import HostMemory, create_memory_file
from workers.llm import shared_memory
from workers.llm.parallel import HeadLayout
from workers.llm.shared_memory import LINE, PART_BYTES, SharedMemory
from workers.nn.weights.shard import Shard

TEXT = read_model_info(EMBEDDED / "model").text


def numbers(shard: Shard) -> range:
    """Those of a shard of one range."""
    (part,) = shard.slices
    return range(part.start, part.stop)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_query_head_is_held_once_and_beside_its_kv_head(size: int) -> None:
    layouts = [HeadLayout(TEXT, rank, size) for rank in range(size)]
    rows = [row for layout in layouts for row in numbers(layout.query)]
    assert rows == list(range(TEXT.num_heads * TEXT.head_dim))
    group = TEXT.num_heads // TEXT.num_kv_heads
    for layout in layouts:
        for head in range(layout.num_heads):
            query = numbers(layout.query).start // TEXT.head_dim + head
            kv_head = head // (layout.num_heads // layout.num_kv_heads)
            assert numbers(layout.kv).start // TEXT.head_dim + kv_head == query // group


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_vocabulary_is_covered_once_by_parts_of_one_size(size: int) -> None:
    divides = 15 % size == 0
    changes = (
        {"num_heads": 15, "num_kv_heads": 15, "intermediate_size": 30, "vocab_size": 101} if divides else {}
    )
    info = dataclasses.replace(TEXT, **changes)
    shards = [HeadLayout(info, rank, size).vocab for rank in range(size)]
    assert [row for shard in shards for row in numbers(shard)] == list(range(info.vocab_size))
    assert len({len(numbers(shard)) + shard.padding for shard in shards}) == 1


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"num_heads": 12, "num_kv_heads": 2}, 8, "tp 8 does not divide the model's 12 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 4}, 3, "tp 3 and the model's 4 KV heads"),
        ({"num_heads": 12, "num_kv_heads": 12, "intermediate_size": 10}, 4, "intermediate size 10"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(
    changes: dict[str, int], size: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        HeadLayout(dataclasses.replace(TEXT, **changes), 0, size)


@pytest.fixture
def ranks() -> Iterator[list[SharedMemory]]:
    """Three, each with a mapping of its own."""
    nbytes = 3 * LINE + 2 * 3 * PART_BYTES
    fd = create_memory_file("ranks", nbytes)
    made = [SharedMemory(rank, [os.getpid()] * 3, HostMemory(fd, nbytes)) for rank in range(3)]
    os.close(fd)
    yield made
    for rank in made:
        rank.close()


def test_sums_and_gathers_are_the_same_on_every_rank(ranks: list[SharedMemory]) -> None:
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[torch.dtype, tuple[int, ...]]] = []
    for count in (1, 7, 300, PART_BYTES // 4, PART_BYTES // 4 + 1, PART_BYTES):
        cases += [(torch.float32, (count,)), (torch.bfloat16, (2, count)), (torch.int32, (count, 1))]
    data = {
        (case, rank): torch.randint(-9, 9, case[1], generator=generator).to(case[0])
        for case in cases
        for rank in range(3)
    }

    def run(rank: int) -> list[tuple[Any, Any]]:
        found = []
        for case in cases:
            x = data[case, rank].clone()
            gathered = ranks[rank].gather(x)
            total = ranks[rank].all_reduce(x)
            assert total.data_ptr() == x.data_ptr()
            found.append((gathered, total))
        return found

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(run, range(3)):
            for case, (gathered, total) in zip(cases, found, strict=True):
                parts = torch.stack([data[case, rank] for rank in range(3)])
                assert torch.equal(gathered, parts)
                assert torch.equal(total, parts.sum(0, dtype=case[0]))


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(
    ranks: list[SharedMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match="rank 1 did not take part"):
        ranks[0].all_reduce(torch.zeros(3))


def test_a_rank_that_has_died_is_not_waited_for() -> None:
    nbytes = 2 * LINE + 2 * 2 * PART_BYTES
    fd = create_memory_file("ranks", nbytes)
    with subprocess.Popen(["sleep", "60"]) as other:
        rank = SharedMemory(0, [os.getpid(), other.pid], HostMemory(fd, nbytes))
        os.close(fd)
        threading.Timer(0.1, other.kill).start()
        with pytest.raises(ConnectionError, match="rank 1 has ended"):
            rank.all_reduce(torch.zeros(3))
    rank.close()
