"""The kernel that chooses tokens, in the interpreter, beside the sampler's own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import CPU, draw_many
from workers.llm.sampling.choice import NUM_PARAMS, Kernel
from workers.llm.sampling.kernel import _exponentials, _random_bits, sample
from workers.llm.sampling.noise import Noise

pytestmark = pytest.mark.interpreter

OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"top_p": 0.9}, {"top_p": 0.05}, {"top_p": 0.999999}, {"top_k": 1}, {"top_k": 40},
    {"min_p": 0.05}, {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 90, "top_p": 0.6}, {"temperature": 0.3, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1e-30},
    {"temperature": 2.0, "top_p": 0.9},
]  # fmt: skip
FEW_OPTIONS: list[dict[str, Any]] = [
    {}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05},
    {"temperature": 1.7, "top_k": 90, "top_p": 0.6},
]  # fmt: skip


@triton.jit
def noise_kernel(keys, bits, times, VOCAB: tl.constexpr):  # type: ignore[no-untyped-def]
    row, tokens = tl.program_id(0), tl.arange(0, VOCAB)
    made = _random_bits(tl.load(keys + row).to(tl.uint64, bitcast=True), tokens)
    tl.store(bits + row * VOCAB + tokens, made.to(tl.int64, bitcast=True))
    tl.store(times + row * VOCAB + tokens, _exponentials(made))


def test_the_random_bits_are_those_of_torch_and_the_times_almost() -> None:
    keys = np.array([0, 1, 1234567, (1 << 64) - 1], dtype=np.uint64)
    bits = torch.empty(4, 4096, dtype=torch.int64)
    times = torch.empty(4, 4096)
    noise_kernel[(4,)](torch.from_numpy(keys.view(np.int64)), bits, times, 4096)
    noise = Noise(4096, CPU)
    assert torch.equal(bits, noise.bits(keys))
    torch.testing.assert_close(times, -noise.log_uniforms(keys), rtol=1e-6, atol=0)


def draw(
    logits: Tensor, options: dict[str, Any], kernel: Kernel | None, seed: int = 3, device: torch.device = CPU
) -> list[int]:
    """Tokens 0, 1, … of one request, by a row of logits each."""
    return draw_many(logits, SamplingParams(seed=seed, **options), len(logits), kernel, device)


@pytest.mark.parametrize(
    ("vocab", "spread", "options"),
    [
        *((300, 3.0, options) for options in OPTIONS),
        # Fewer tokens than `top_k`, and more than one tile has: all kinds of options once.
        *((vocab, 1.0, options) for vocab in (7, 5000) for options in OPTIONS if options in FEW_OPTIONS),
    ],
    ids=str,
)
def test_it_draws_what_the_sampler_draws(vocab: int, spread: float, options: dict[str, Any]) -> None:
    torch.manual_seed(vocab)
    logits = spread * torch.randn(4 if vocab == 5000 else 8, vocab)
    drawn, expected = draw(logits, options, sample), draw(logits, options, None)
    assert drawn == expected


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
    params = torch.zeros(NUM_PARAMS, 3, dtype=torch.int32)
    logits = torch.full((3, 100), torch.nan)
    logits[1, 42] = 9.0
    logits[1].nan_to_num_(0.0)
    logits[1, 42] = 9.0
    chosen = sample(logits, params)
    assert chosen[1] == 42
    assert bool(((chosen >= 0) & (chosen < 100)).all())
