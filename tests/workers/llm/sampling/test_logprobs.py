from __future__ import annotations

import numpy as np
import torch

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import make_sampler, sample, start


def test_logprobs_are_those_of_the_model_whatever_is_done_to_them() -> None:
    logits = torch.randn(3, 50)
    params = [
        SamplingParams(temperature=0.5, seed=1, logprobs=3, logit_bias={5: 100.0}),
        SamplingParams(seed=1),
        SamplingParams(seed=2, logprobs=0),
    ]
    sampled = sample(logits, params, [0, 0, 0])
    expected = logits.log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.logprob_token_ids is not None
    assert sampled.token_ids[0] == 5
    wanting = [0, 2]
    assert sampled.logprob_token_ids[wanting, 0].tolist() == sampled.token_ids[wanting].tolist()
    of_wanting = expected[wanting].gather(-1, sampled.logprob_token_ids[wanting])
    torch.testing.assert_close(sampled.logprobs[wanting], of_wanting)
    assert sampled.logprob_token_ids[0, 1:].tolist() == expected[0].topk(3).indices.tolist()


def test_each_row_has_as_many_as_it_asked_for() -> None:
    sampler = make_sampler(3, 50)
    for slot, count in enumerate((3, None, 0)):
        start(sampler, slot, SamplingParams(seed=1, logprobs=count))
    assert sampler.num_logprobs(np.array([2, 1, 0, 1])) == [0, -1, 3, -1]
    assert sampler.sample(torch.randn(1, 50), np.array([1]), np.array([0])).logprobs is None
