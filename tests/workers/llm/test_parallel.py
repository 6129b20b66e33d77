from __future__ import annotations

import dataclasses

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from workers.llm.parallel import HeadLayout

TEXT = read_model_info(EMBEDDED / "model").text


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_query_head_is_held_once_and_beside_its_kv_head(size: int) -> None:
    layouts = [HeadLayout(TEXT, rank, size) for rank in range(size)]
    rows = [row for layout in layouts for row in range(layout.query_rows.start, layout.query_rows.stop)]
    assert rows == list(range(TEXT.num_heads * TEXT.head_dim))
    group = TEXT.num_heads // TEXT.num_kv_heads
    for layout in layouts:
        for head in range(layout.num_heads):
            query = layout.query_rows.start // TEXT.head_dim + head
            key = layout.kv_rows.start // TEXT.head_dim + head // (layout.num_heads // layout.num_kv_heads)
            assert key == query // group


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_vocabulary_is_covered_once(size: int) -> None:
    info = dataclasses.replace(TEXT, num_heads=15, num_kv_heads=15, intermediate_size=30, vocab_size=101) if 15 % size == 0 else TEXT
    rows = [row for rank in range(size) for row in range(*HeadLayout(info, rank, size).vocab_rows.indices(info.vocab_size))]
    assert rows == list(range(info.vocab_size))


@pytest.mark.parametrize(
    ("changes", "size", "words"),
    [
        ({"num_heads": 12, "num_kv_heads": 2}, 8, "tp 8 does not divide the model's 12 attention heads"),
        ({"num_heads": 12, "num_kv_heads": 4}, 3, "tp 3 and the model's 4 KV heads"),
        ({"num_heads": 12, "num_kv_heads": 12, "intermediate_size": 10}, 4, "intermediate size 10"),
    ],
)
def test_what_does_not_divide_is_refused_with_the_numbers(changes: dict[str, int], size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HeadLayout(dataclasses.replace(TEXT, **changes), 0, size)
