from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import draw_many, make_sampler, sample, start


def test_nothing_ends_a_request_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 9.0, 8.0, 7.0]])
    params = SamplingParams(temperature=0, seed=1, min_tokens=2, stop_token_ids=(3, 2))
    assert [sample(logits, [params], [number]).token_ids.item() for number in range(4)] == [4, 4, 2, 2]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_what_ends_a_request_is_not_drawn_either(options: dict[str, float]) -> None:
    logits = torch.tensor([0.0, 1.0, 3.0, 3.0, 1.0])
    drawn = draw_many(logits, SamplingParams(seed=1, min_tokens=200, stop_token_ids=(3,), **options), 400)
    assert not set(drawn[:200]) & {2, 3}
    assert set(drawn[200:]) & {2, 3}


def test_output_of_an_earlier_attempt_counts() -> None:
    sampler, logits = make_sampler(1, 5), torch.tensor([[0.0, 3.0, 9.0, 8.0, 7.0]])
    start(sampler, 0, SamplingParams(temperature=0, seed=1, min_tokens=2), prompt=[1], output=[4, 4])
    assert sampler.sample(logits, np.array([0]), np.array([3])).token_ids.tolist() == [2]
