from __future__ import annotations

import pytest
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from workers.llm.cache.plan import GIB, plan_cache
from workers.llm.cache.spec import Paged, State

PAGED = Paged(2, 64)  # 256 numbers a token
STATE = State((16, 128, 128), torch.float32)  # 1 MiB


def config(max_num_seqs: int = 8, max_model_len: int | None = None) -> Config:
    llm = LlmConfig(max_num_seqs=max_num_seqs, block_size=16)
    return Config(model=ModelConfig(max_model_len=max_model_len), llm=llm)


def test_the_context_is_cut_to_what_fits() -> None:
    block_bytes = 4 * 256 * 4 * 16
    plan = plan_cache([PAGED] * 4, 100_000, config(), torch.float32, 10.5 * block_bytes / GIB)
    assert plan == (10, 160)


def test_there_is_never_more_than_all_contexts_need() -> None:
    assert plan_cache([PAGED], 1000, config(max_num_seqs=3), torch.bfloat16, 1.0) == (3 * 63, 1000)


def test_states_take_their_part_first() -> None:
    """A slot for each sequence, and one for the rows that fill up a batch."""
    hybrid = [STATE, STATE, STATE, PAGED]
    block_bytes = 256 * 2 * 16
    gib = (9 * 3 * STATE.nbytes + 7 * block_bytes) / GIB
    assert plan_cache(hybrid, 100_000, config(max_num_seqs=8), torch.bfloat16, gib) == (7, 112)
    with pytest.raises(
        ValueError,
        match=r"the states of 16 sequences take 0\.050 GiB, but there is room for 0\.026",
    ):
        plan_cache(hybrid, 100_000, config(max_num_seqs=16), torch.bfloat16, gib)


def test_a_model_of_states_alone_has_room_for_all_its_contexts() -> None:
    assert plan_cache([STATE], 100, config(max_num_seqs=2), torch.float32, 1.0) == (14, 100)


@pytest.mark.parametrize(
    ("asked", "words"),
    [(2001, "is more than the model's 2000"), (1000, r"takes 0\.\d+ GiB of KV cache")],
)
def test_what_does_not_fit_is_refused_with_the_numbers(asked: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_cache([PAGED], 2000, config(max_model_len=asked), torch.float32, 1e-4)
