from __future__ import annotations

import pytest

from workers.nn.weights.shard import WHOLE, Shard


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_equal_parts_cover_an_axis(num_ranks: int) -> None:
    shards = [Shard.split(12, rank, num_ranks) for rank in range(num_ranks)]
    rows = [row for shard in shards for part in shard.slices for row in range(12)[part]]
    assert rows == list(range(12))
    assert {shard.padding for shard in shards} == {0}


@pytest.mark.parametrize(("size", "num_ranks"), [(10, 1), (10, 3), (10, 4), (2, 4)])
def test_padded_parts_have_one_size(size: int, num_ranks: int) -> None:
    shards = [Shard.split_padded(size, rank, num_ranks) for rank in range(num_ranks)]
    lengths = [len(range(size)[shard.slices[0]]) for shard in shards]
    assert sum(lengths) == size
    padded = {length + shard.padding for length, shard in zip(lengths, shards, strict=True)}
    assert padded == {-(-size // num_ranks)}


def test_the_whole_is_the_default() -> None:
    assert Shard() == WHOLE
    assert [*range(5)][WHOLE.slices[0]] == [0, 1, 2, 3, 4]
