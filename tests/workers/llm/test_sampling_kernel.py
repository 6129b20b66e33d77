"""The kernel that chooses tokens, in the interpreter, beside the sampler's own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.messages import SequenceStart
from pipeline.sampling import SamplingParams
from workers.llm.sampler import Sampler
from workers.llm.sampling_kernel import sample

pytestmark = pytest.mark.interpreter

OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"top_p": 0.9}, {"top_p": 0.05}, {"top_p": 0.999999}, {"top_k": 1}, {"top_k": 40}, {"min_p": 0.05}, {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 90, "top_p": 0.6}, {"temperature": 0.3, "top_p": 0.8, "min_p": 0.01}, {"temperature": 1e-30},
    {"temperature": 2.0, "top_p": 0.9},
]  # fmt: skip


def draw(logits: Tensor, options: dict[str, Any], kernel: Callable[[Tensor, Tensor], Tensor] | None, seed: int = 3) -> list[int]:
    """Tokens 0, 1, … of one request, by a row of logits each."""
    sampler = Sampler(1, logits.shape[-1], (), torch.device("cpu"), kernel)
    sampler.start(SequenceStart(0, 0, SamplingParams(seed=seed, **options), b""))
    return sampler.sample(logits, np.zeros(len(logits), dtype=np.int64), np.arange(len(logits))).token_ids.tolist()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("vocab", "spread"), [(7, 1.0), (300, 3.0), (5000, 1.0)])
def test_it_draws_what_the_sampler_draws(options: dict[str, Any], vocab: int, spread: float) -> None:
    torch.manual_seed(vocab)
    logits = spread * torch.randn(6 if vocab == 5000 else 12, vocab)
    drawn, expected = draw(logits, options, sample), draw(logits, options, None)
    # A point may lie so close to the border of two tokens that float32 takes the next one. They are narrow where there are many.
    assert sum(a != b for a, b in zip(drawn, expected, strict=True)) <= (vocab == 5000)
    assert all(abs(a - b) < 10 for a, b in zip(drawn, expected, strict=True))


def test_banned_tokens_and_rows_of_one_hope() -> None:
    logits = torch.full((8, 5000), -torch.inf)
    logits[:, 4321] = -3e38
    assert draw(logits, {}, sample) == [4321] * 8
    assert draw(logits, {"top_p": 0.5, "top_k": 3}, sample) == [4321] * 8


def test_equal_logits_are_kept_together_and_the_first_is_the_best() -> None:
    logits = torch.zeros(30, 10)
    logits[:, 5:] = -1.0
    assert set(draw(logits, {"top_k": 2}, sample)) == set(range(5))
    assert set(draw(logits, {"temperature": 0}, sample)) == {0}


def test_a_padded_batch_may_hold_anything() -> None:
    params = torch.zeros(5, 3, dtype=torch.int32)
    logits = torch.full((3, 100), torch.nan)
    logits[1, 42] = 9.0
    logits[1].nan_to_num_(0.0)
    logits[1, 42] = 9.0
    chosen = sample(logits, params)
    assert chosen[1] == 42
    assert bool(((chosen >= 0) & (chosen < 100)).all())
