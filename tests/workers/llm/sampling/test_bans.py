from __future__ import annotations

import numpy as np
import torch

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import make_sampler, start

VOCAB = 9


def banning(*sequences: list[int], **options: object) -> SamplingParams:
    packed = tuple(pack_int32(one) for one in sequences)
    return SamplingParams(temperature=0, seed=1, banned_token_ids=packed, **options)  # type: ignore[arg-type]


def wish(*token_ids: int) -> torch.Tensor:
    """Logits of which the first token is the best, the second the second best, and so on."""
    logits = torch.zeros(1, VOCAB)
    for rank, token_id in enumerate(token_ids):
        logits[0, token_id] = 9.0 - rank
    return logits


def write(sampler: object, slot: int, wishes: list[tuple[int, ...]], num_prompt: int = 1) -> list[int]:
    tokens = []
    for number, wished in enumerate(wishes):
        made = sampler.sample(wish(*wished), np.array([slot]), np.array([num_prompt + number]))  # type: ignore[attr-defined]
        tokens.append(int(made.token_ids))
    return tokens


def test_one_token_never_comes() -> None:
    sampler = make_sampler(1, VOCAB)
    start(sampler, 0, banning([5]), prompt=[1])
    assert write(sampler, 0, [(5, 6), (6, 5), (5, 4)]) == [6, 6, 4]


def test_a_sequence_is_not_finished_but_its_parts_may_come() -> None:
    sampler = make_sampler(1, VOCAB)
    start(sampler, 0, banning([3, 4, 5]), prompt=[1])
    assert write(sampler, 0, [(4,), (5,), (3,), (4,), (5, 7), (3,), (5,)]) == [4, 5, 3, 4, 7, 3, 5]


def test_sequences_of_several_lengths_with_one_last_token() -> None:
    sampler = make_sampler(1, VOCAB)
    start(sampler, 0, banning([3, 4, 5], [6, 5], [8]), prompt=[1])
    assert write(sampler, 0, [(6,), (5, 2), (5,), (8, 3), (4,), (5, 7)]) == [6, 2, 5, 3, 4, 7]


def test_the_prompt_does_not_count_and_an_earlier_attempt_does() -> None:
    sampler = make_sampler(2, VOCAB)
    start(sampler, 0, banning([3, 5]), prompt=[3])
    assert write(sampler, 0, [(5, 6)]) == [5]
    start(sampler, 1, banning([3, 5]), prompt=[1], output=[4, 3])
    assert write(sampler, 1, [(5, 6)], num_prompt=3) == [6]


def test_a_slot_forgets_the_request_before() -> None:
    sampler = make_sampler(1, VOCAB)
    start(sampler, 0, banning([5]), prompt=[1])
    start(sampler, 0, SamplingParams(temperature=0, seed=1), prompt=[1])
    assert write(sampler, 0, [(5, 6)]) == [5]


def test_each_row_has_its_own_bans() -> None:
    sampler = make_sampler(3, VOCAB)
    for slot, params in enumerate((banning([5]), SamplingParams(temperature=0, seed=1), banning([6]))):
        start(sampler, slot, params, prompt=[1])
    made = sampler.sample(wish(5, 6).repeat(3, 1), np.arange(3), np.ones(3, dtype=np.int64))
    assert made.token_ids.tolist() == [6, 5, 5]


def test_nothing_but_what_is_allowed_comes() -> None:
    sampler = make_sampler(2, VOCAB)
    allowed = SamplingParams(temperature=0, seed=1, allowed_token_ids=(4, 7))
    start(sampler, 0, allowed, prompt=[1])
    start(sampler, 1, SamplingParams(temperature=0, seed=1), prompt=[1])
    made = sampler.sample(wish(5, 6, 7).repeat(2, 1), np.arange(2), np.ones(2, dtype=np.int64))
    assert made.token_ids.tolist() == [7, 5]
    drawn = SamplingParams(temperature=5, seed=1, allowed_token_ids=(4, 7))
    start(sampler, 0, drawn, prompt=[1])
    numbers = range(1, 60)
    tokens = {int(sampler.sample(wish(5), np.array([0]), np.array([n])).token_ids) for n in numbers}
    assert tokens == {4, 7}
