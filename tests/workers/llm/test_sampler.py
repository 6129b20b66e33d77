from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.messages import SequenceStart, pack_int32
from pipeline.sampling import SamplingParams
from workers.llm.sampler import Sampled, Sampler, uniform

EOS = 2


def sample(logits: Tensor, params: Sequence[SamplingParams], numbers: Sequence[int], tokens: Sequence[Sequence[int]] | None = None) -> Sampled:
    """One step of a fresh sampler: row i is the token `numbers[i]` of a request with an empty prompt and the output `tokens[i]`."""
    sampler = Sampler(len(params), logits.shape[-1], (EOS,), torch.device("cpu"))
    for slot, one in enumerate(params):
        sampler.start(SequenceStart(slot, 0, one, pack_int32(tokens[slot] if tokens else ())))
    return sampler.sample(logits, np.arange(len(params)), np.array(numbers))


def draw_many(logits: Tensor, params: SamplingParams, count: int) -> list[int]:
    """Tokens 0 … count - 1 of one request, each with these logits."""
    sampler = Sampler(1, logits.shape[-1], (EOS,), torch.device("cpu"))
    sampler.start(SequenceStart(0, 0, params, b""))
    return sampler.sample(logits.expand(count, -1), np.zeros(count, dtype=np.int64), np.arange(count)).token_ids.tolist()


def test_greedy_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [SamplingParams(temperature=0, seed=1)] * 2, [0, 0]).token_ids.tolist() == [1, 0]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"presence_penalty": 1.0}])
def test_a_draw_depends_on_seed_and_number_only(options: dict[str, float]) -> None:
    logits = torch.randn(1, 5000)
    params = SamplingParams(seed=42, **options)
    others = [
        SamplingParams(seed=5, temperature=0.5, top_p=0.3, logprobs=5, logit_bias={7: 3.0}), SamplingParams(temperature=0, seed=1, min_tokens=3),
        SamplingParams(seed=8, repetition_penalty=1.5, top_k=3),
    ]  # fmt: skip
    alone = [sample(logits, [params], [k]).token_ids.tolist()[0] for k in range(20)]
    together = [sample(torch.cat([torch.randn(3, 5000), logits]), [*others, params], [3, 0, 1, k]).token_ids.tolist()[3] for k in range(20)]
    assert alone == together
    assert len(set(alone)) > 5


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = np.bincount(draw_many(probs.log(), SamplingParams(seed=9), 20_000), minlength=4) / 20_000
    assert np.abs(counts - probs.numpy()).max() < 0.015


def test_temperature_sharpens() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    drawn = draw_many(probs.log(), SamplingParams(seed=9, temperature=0.5), 5000)
    squared = (probs**2 / (probs**2).sum()).numpy()
    assert np.abs(np.bincount(drawn, minlength=3) / 5000 - squared).max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert draw_many(torch.tensor([1.0, 30.0, 29.0, -5.0]), SamplingParams(seed=1, temperature=temperature), 1) == [1]


def drawn_tokens(**params: float) -> set[int]:
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    return set(draw_many(probs.log(), SamplingParams(seed=3, **params), 3000))


def test_top_k_keeps_the_best() -> None:
    assert drawn_tokens(top_k=1) == {1}
    assert drawn_tokens(top_k=2) == {1, 3}
    assert drawn_tokens(top_k=0) == drawn_tokens(top_k=-1) == drawn_tokens(top_k=50) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    assert drawn_tokens(top_p=0.4) == {1}
    assert drawn_tokens(top_p=0.51) == {1, 3}
    assert drawn_tokens(top_p=0.85) == {0, 1, 3}
    assert drawn_tokens(top_p=1e-9) == {1}
    assert drawn_tokens(top_p=0.51, top_k=1) == {1}
    assert drawn_tokens(top_p=0.6, top_k=2) == {1}, "of what top_k keeps, 0.5 of 0.8 is enough"


def test_min_p_keeps_what_is_near_the_best() -> None:
    assert drawn_tokens(min_p=0.31) == {1, 3}
    assert drawn_tokens(min_p=0.2) == {0, 1, 3}
    assert drawn_tokens(min_p=1.0) == {1}


@pytest.mark.parametrize("params", [{"top_p": 0.999}, {"top_p": 0.5}, {"top_k": 3000}, {"top_k": 2000, "top_p": 0.9}, {"min_p": 0.01}])
def test_a_flat_distribution_over_many_tokens_is_cut_as_defined(params: dict[str, float]) -> None:
    """More tokens are kept than are sorted first; the definition, token by token in Python, says which."""
    torch.manual_seed(0)
    logits = torch.randn(6000)
    probs = logits.double().softmax(-1)
    order = probs.argsort(descending=True).tolist()[: int(params.get("top_k", 6000))]
    total, seen, kept = sum(probs[order].tolist()), 0.0, set()
    for token in order:
        if seen >= params.get("top_p", 1.0) * total:
            break
        seen += float(probs[token])
        if probs[token] >= params.get("min_p", 0.0) * probs.max():
            kept.add(token)
    drawn = set(draw_many(logits, SamplingParams(seed=3, **params), 4000))
    assert drawn <= kept
    assert len(drawn) > 0.2 * len(kept)
    reached = drawn_at(logits, SamplingParams(seed=3, **params), kept)
    assert reached == kept


def test_a_top_k_beyond_what_is_sorted_first_counts_as_the_whole_for_top_p() -> None:
    probs = torch.cat([torch.full((1024,), 0.905 / 1024), torch.full((976,), 0.045 / 976), torch.full((4000,), 0.05 / 4000)]).double()
    probs -= torch.linspace(0, 1e-9, 6000).double()  # no two alike
    kept = drawn_at(probs.log(), SamplingParams(seed=3, top_k=2000, top_p=0.9), set())
    assert abs(len(kept) - 968) <= 1, "0.9 of the 0.95 that top_k keeps"


def drawn_at(logits: Tensor, params: SamplingParams, kept: set[int]) -> set[int]:
    """What is left with a probability at all."""
    sampler = Sampler(1, logits.shape[-1], (EOS,), torch.device("cpu"))
    sampler.start(SequenceStart(0, 0, params, b""))
    least = sampler._least_probable(logits[None].double().softmax(-1), sampler._params[:1])
    return set((logits.double().softmax(-1) >= least[0]).nonzero()[:, 0].tolist())


def test_penalties_count_the_output_and_repetition_the_prompt_too() -> None:
    sampler = Sampler(2, 5, (EOS,), torch.device("cpu"))
    params = SamplingParams(temperature=0, seed=1, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0)
    sampler.start(SequenceStart(0, 2, params, pack_int32([0, 1, 3, 3])))  # prompt 0 1, output 3 3
    sampler.start(SequenceStart(1, 0, SamplingParams(temperature=0, seed=1), b""))
    logits = torch.tensor([[4.0, -1.0, 0.5, 6.0, 0.0]] * 2)
    rows = np.array([0, 1])
    adjusted = sampler._adjust(logits, rows, sampler._params[rows], np.array([2, 0]))
    assert adjusted[0].tolist() == [2.0, -2.0, 0.5, 6.0 / 2 - 1.0 - 2 * 0.5, 0.0]
    assert adjusted[1].tolist() == logits[1].tolist()
    assert sampler.sample(logits, rows, np.array([4, 0])).token_ids.tolist() == [0, 3]
    adjusted = sampler._adjust(logits, rows, sampler._params[rows], np.array([3, 0]))
    assert adjusted[0, 0].item() == 2.0 - 1.0 - 0.5, "what was sampled since counts"


def test_a_slot_forgets_who_was_there_before() -> None:
    sampler = Sampler(1, 5, (EOS,), torch.device("cpu"))
    params = SamplingParams(temperature=0, seed=1, frequency_penalty=2.0, logit_bias={4: 50.0}, stop_token_ids=(3,), min_tokens=5, logprobs=2)
    sampler.start(SequenceStart(0, 0, params, pack_int32([1, 1])))
    logits = torch.tensor([[0.0, 1.0, 0.5, 2.0, 0.0]])
    assert sampler.sample(logits, np.array([0]), np.array([2])).token_ids.tolist() == [4]
    sampler.start(SequenceStart(0, 0, SamplingParams(temperature=0, seed=1, frequency_penalty=2.0), b""))
    sampled = sampler.sample(logits, np.array([0]), np.array([0]))
    assert (sampled.token_ids.tolist(), sampled.logprobs) == ([3], None)


def test_bias_moves_a_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    params = [SamplingParams(temperature=0, seed=1, logit_bias={0: 4.0, 1: -100.0}), SamplingParams(temperature=0, seed=1)]
    assert sample(logits, params, [0, 0]).token_ids.tolist() == [0, 1]


def test_nothing_ends_a_request_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 9.0, 8.0, 7.0]])
    params = SamplingParams(temperature=0, seed=1, min_tokens=2, stop_token_ids=(3,))
    assert [sample(logits, [params], [number]).token_ids.item() for number in range(4)] == [4, 4, 2, 2]


def test_logprobs_are_those_of_the_model_whatever_is_done_to_them() -> None:
    logits = torch.randn(3, 50)
    params = [
        SamplingParams(temperature=0.5, seed=1, logprobs=3, logit_bias={5: 100.0}), SamplingParams(seed=1), SamplingParams(seed=2, logprobs=0)
    ]  # fmt: skip
    sampled = sample(logits, params, [0, 0, 0])
    expected = logits.log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.logprob_token_ids is not None
    assert sampled.token_ids[0] == 5
    assert sampled.logprob_token_ids[:, 0].tolist() == sampled.token_ids.tolist()
    torch.testing.assert_close(sampled.logprobs, expected.gather(-1, sampled.logprob_token_ids))
    assert sampled.logprob_token_ids[0, 1:].tolist() == expected[0].topk(3).indices.tolist()


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    seeds, numbers = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64), indexing="ij")
    drawn = uniform(seeds.ravel(), numbers.ravel()).reshape(200, 200)
    assert 0 <= drawn.min() < drawn.max() < 1
    histogram = np.histogram(drawn, 20, (0, 1))[0] / drawn.size
    assert np.abs(histogram - 0.05).max() < 0.005
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
