from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.sampling import SamplingParams
from workers.llm.sampler import Draw, sample, uniform


def test_greedy_takes_the_best() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert sample(logits, [Draw(SamplingParams(temperature=0, seed=1), 0)] * 2) == [1, 0]


def test_a_draw_depends_on_seed_and_number_only() -> None:
    logits = torch.randn(1, 500)
    params = SamplingParams(seed=42)
    alone = [sample(logits, [Draw(params, k)])[0] for k in range(20)]
    others = [Draw(SamplingParams(seed=5, temperature=0.5), 3), Draw(SamplingParams(temperature=0, seed=1), 0)]
    together = [sample(torch.cat([torch.randn(2, 500), logits]), [*others, Draw(params, k)])[2] for k in range(20)]
    assert alone == together
    assert len(set(alone)) > 5


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 20_000
    drawn = sample(probs.log().expand(rows, -1), [Draw(SamplingParams(seed=9), k) for k in range(rows)])
    counts = np.bincount(drawn, minlength=4) / rows
    assert np.abs(counts - probs.numpy()).max() < 0.015


def test_temperature_sharpens() -> None:
    probs = torch.tensor([0.5, 0.3, 0.2])
    drawn = sample(probs.log().expand(5000, -1), [Draw(SamplingParams(seed=9, temperature=0.5), k) for k in range(5000)])
    squared = (probs**2 / (probs**2).sum()).numpy()
    assert np.abs(np.bincount(drawn, minlength=3) / 5000 - squared).max() < 0.03


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-308, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[1.0, 30.0, 29.0, -5.0]])
    assert sample(logits, [Draw(SamplingParams(seed=1, temperature=temperature), 0)]) == [1]


def drawn_tokens(**params: float) -> set[int]:
    probs = torch.tensor([0.15, 0.5, 0.05, 0.3])
    sampling = SamplingParams(seed=3, **params)
    return set(sample(probs.log().expand(3000, -1), [Draw(sampling, k) for k in range(3000)]))


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


def test_uniform_numbers_are_uniform_and_uncorrelated() -> None:
    seeds, numbers = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64), indexing="ij")
    drawn = uniform(seeds.ravel(), numbers.ravel()).reshape(200, 200)
    assert 0 <= drawn.min() < drawn.max() < 1
    histogram = np.histogram(drawn, 20, (0, 1))[0] / drawn.size
    assert np.abs(histogram - 0.05).max() < 0.005
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
