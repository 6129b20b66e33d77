from __future__ import annotations

import numpy as np
import torch

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import make_setup, sample
from workers.llm.sampling.base import LogitRows, TokensSoFar
from workers.llm.sampling.bias import Bias

NOTHING = TokensSoFar(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32))


def test_bias_moves_a_token() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 2)
    params = [
        SamplingParams(temperature=0, seed=1, logit_bias={0: 4.0, 1: -100.0}),
        SamplingParams(temperature=0, seed=1),
    ]
    assert sample(logits, params, [0, 0]).token_ids.tolist() == [0, 1]


def test_biases_of_any_length_change_their_own_rows_only() -> None:
    bias = Bias(make_setup(4, 6))
    assert bias.start(0, SamplingParams(logit_bias={5: 1.0}), NOTHING)
    assert not bias.start(1, SamplingParams(), NOTHING)
    assert bias.start(3, SamplingParams(logit_bias={0: -2.0, 4: 0.5, 2: 1.0}), NOTHING)
    logits = torch.zeros(3, 6)
    bias.apply(logits, LogitRows(np.array([0, 2]), np.array([3, 0]), np.array([7, 7])))
    assert logits.tolist() == [[-2.0, 0.0, 1.0, 0.0, 0.5, 0.0], [0.0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
