from __future__ import annotations

import pytest
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from workers.llm.cache.kv_formats import FORMATS
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.plan import GIB, CachePlan, available_gib, describe, plan_cache
from workers.llm.cache.spec import Paged, State

PAGED = Paged(2, 64)  # 256 numbers a token
STATE = State((16, 128, 128), torch.float32)  # 1 MiB


def config(
    max_num_seqs: int = 8,
    max_model_len: int | None = None,
    prefix_caching: bool = False,
    kv_cache_dtype: str = "auto",
) -> Config:
    llm = LlmConfig(
        max_num_seqs=max_num_seqs, block_size=16, prefix_caching=prefix_caching, kv_cache_dtype=kv_cache_dtype
    )
    return Config(model=ModelConfig(max_model_len=max_model_len), llm=llm)


def test_the_context_is_cut_to_what_fits() -> None:
    block_bytes = 4 * 256 * 4 * 16
    plan = plan_cache([PAGED] * 4, 100_000, config(), torch.float32, 10.5 * block_bytes / GIB)
    assert plan == (10, 160, 8, 0, 0)


def test_there_is_never_more_than_all_contexts_need() -> None:
    assert plan_cache([PAGED], 1000, config(max_num_seqs=3), torch.bfloat16, 1.0) == (3 * 63, 1000, 3, 0, 0)


HYBRID = [STATE, STATE, STATE, PAGED]
SLOT = 3 * STATE.nbytes(torch.bfloat16)
BLOCK = 256 * 2 * 16


def test_states_have_what_all_sequences_need_where_it_is_less_than_half() -> None:
    """A slot for each sequence, and one for the rows that fill up a batch."""
    gib = (18 * SLOT + 7 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 100_000, config(max_num_seqs=8), torch.bfloat16, gib)
    num_blocks = 9 * SLOT // BLOCK + 7
    assert plan == (num_blocks, num_blocks * 16, 8, 0, 0)


def test_where_states_need_more_than_half_there_are_fewer_sequences() -> None:
    gib = (2 * 5 * SLOT + 2 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 100_000, config(max_num_seqs=64), torch.bfloat16, gib)
    num_blocks = 5 * SLOT // BLOCK + 2
    assert plan == (num_blocks, num_blocks * 16, 4, 0, 0)


def test_states_have_what_short_contexts_leave() -> None:
    gib = (9 * SLOT + 8 * 10 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 100_000, config(max_num_seqs=8, max_model_len=160), torch.bfloat16, gib)
    assert plan == (80, 160, 8, 0, 0)


def test_prefixes_have_what_the_states_of_sequences_leave() -> None:
    gib = (18 * SLOT + 7 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 100_000, config(max_num_seqs=3, prefix_caching=True), torch.bfloat16, gib)
    assert (plan.num_slots, plan.num_snapshots) == (3, 9 - 1 - 3)
    plan = plan_cache(HYBRID, 100_000, config(max_num_seqs=64, prefix_caching=True), torch.bfloat16, gib)
    assert (plan.num_slots, plan.num_snapshots) == (4, 4), "half of them each"
    assert plan.num_blocks == 9 * SLOT // BLOCK + 7


def test_a_cache_for_one_state_has_no_prefixes() -> None:
    gib = (4 * SLOT + 7 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 100_000, config(prefix_caching=True), torch.bfloat16, gib)
    assert (plan.num_slots, plan.num_snapshots) == (1, 0)


def test_a_context_that_is_asked_for_comes_before_further_sequences() -> None:
    long = 6 * SLOT // BLOCK * 16
    gib = (8 * SLOT + 2 * BLOCK) / GIB
    plan = plan_cache(HYBRID, 10**6, config(max_model_len=long), torch.bfloat16, gib)
    assert plan == (6 * SLOT // BLOCK, long, 1, 0, 0)
    less = gib - SLOT / GIB
    with pytest.raises(ValueError, match=r"states of one sequence, .* take 0\.006 GiB, but there is room"):
        plan_cache(HYBRID, 10**6, config(max_model_len=long), torch.bfloat16, less)


def test_drafts_come_off_the_memory_of_states_and_blocks() -> None:
    gib = (18 * SLOT + 7 * BLOCK) / GIB
    plain = plan_cache(HYBRID, 100_000, config(), torch.bfloat16, gib)
    more = plan_cache(HYBRID, 100_000, config(), torch.bfloat16, gib + 15 * SLOT / GIB, num_drafts=15)
    assert more == plain._replace(num_drafts=15)
    assert "0 prefixes and 15 drafts" in describe(more, HYBRID, LlmConfig(), torch.bfloat16)
    assert plan_cache([PAGED], 1000, config(), torch.bfloat16, 1.0, num_drafts=15).num_drafts == 0
    words = r"take 0\.006 GiB, but beside 0\.044 for 15 drafts there is room for 0\.000: raise"
    with pytest.raises(ValueError, match=words):
        plan_cache(HYBRID, 100_000, config(), torch.bfloat16, 9 * SLOT / GIB, num_drafts=15)


def test_a_model_of_states_alone_has_room_for_all_its_contexts() -> None:
    assert plan_cache([STATE], 100, config(max_num_seqs=2), torch.float32, 1.0) == (14, 100, 2, 0, 0)


def test_the_division_is_told() -> None:
    plan = plan_cache(HYBRID, 10_000, config(max_num_seqs=8), torch.bfloat16, 0.5)
    told = describe(plan, HYBRID, LlmConfig(), torch.bfloat16)
    assert told == (
        "the KV cache has 0.04 GiB for 80000 tokens; states have 0.03 GiB for 8 sequences at once and "
        "0 prefixes, 3.0 MiB each"
    )
    told = describe(CachePlan(4, 64, 8), [PAGED], LlmConfig(), torch.bfloat16)
    assert told == "the KV cache has 0.00 GiB for 64 tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_cache_in_8_bits_has_room_for_as_many_more_tokens_as_its_bytes_say(
    name: str, dtype: torch.dtype
) -> None:
    """States have what they had."""
    heads, quantized = Paged(2, 128), config(kv_cache_dtype=name)
    plain, more = (plan_cache([STATE, heads], 10**6, one, dtype, 0.5) for one in (config(), quantized))
    assert more.num_blocks / plain.num_blocks == pytest.approx(128 * dtype.itemsize / 132, rel=1e-3)
    assert (more.num_slots, more.num_snapshots) == (plain.num_slots, plain.num_snapshots)
    cache = PagedTensors([heads], 4, 16, dtype, torch.device("cpu"), FORMATS[name])
    num_bytes = sum(tensor.nbytes for tensor in (*cache.tensors, *cache.scales))
    assert num_bytes == 5 * 16 * heads.bytes_per_token(dtype, cache.format), "with the spare block"
    told = describe(more, [STATE, heads], quantized.llm, dtype)
    assert f"GiB for {more.num_blocks * 16} tokens in {name}; states have" in told


@pytest.mark.parametrize(
    ("asked", "words"),
    [(2001, "is more than the model's 2000"), (1000, r"takes 0\.\d+ GiB of KV cache")],
)
def test_what_does_not_fit_is_refused_with_the_numbers(asked: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan_cache([PAGED], 2000, config(max_model_len=asked), torch.float32, 1e-4)


def test_a_cpu_has_room_for_states_beside_the_kv_cache() -> None:
    cpu = torch.device("cpu")
    assert available_gib(config(), cpu, 0) == 1
    assert available_gib(config(), cpu, 18 << 20) == 1 + 32 * 18 / 1024
    assert available_gib(config(), cpu, 18 << 20, num_drafts=15) == 1 + 47 * 18 / 1024
    asked = Config(llm=LlmConfig(kv_cache_gib=0.5))
    assert available_gib(asked, cpu, 18 << 20) == 0.5
