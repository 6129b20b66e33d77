from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.workers.llm.sampling.rig import CPU
from workers.llm.sampling.noise import GOLDEN, LARGEST, MAX_ROWS, SMALLEST, Noise, draw_keys, mix

MASK = (1 << 64) - 1
KEYS = np.array([0, 1, 1234567, MASK], dtype=np.uint64)


def splitmix64(state: int) -> int:
    """The output of the generator at a state, in Python's integers."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_the_generator_is_splitmix64() -> None:
    """The first numbers of the seed 1234567, as published beside the reference implementation in C."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64((1234567 + i * GOLDEN) & MASK) for i in range(1, 5)] == published
    states = np.arange(1, 5, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(1234567)
    assert mix(states).tolist() == published


def test_torch_has_the_bits_of_python_integers_at_all_tokens_and_at_some() -> None:
    noise = Noise(3000, CPU)
    expected = [
        [splitmix64((int(key) + (token + 1) * GOLDEN) & MASK) for token in range(3000)] for key in KEYS
    ]
    whole = noise.bits(KEYS).numpy().view(np.uint64)
    assert whole.tolist() == expected
    some = torch.tensor([2999, 0, 17])
    assert noise.bits(KEYS[2:3], some).numpy().view(np.uint64).tolist() == [
        [expected[2][token] for token in some]
    ]


def test_times_are_those_of_the_exact_numbers() -> None:
    """-log(u) by the low 63 bits as 1 - u, to 5e-7 of itself, also where u is 1 in float32."""
    noise = Noise(4000, CPU)
    times = -noise.log_uniforms(KEYS).double()
    rest = (noise.bits(KEYS).numpy().view(np.uint64) & np.uint64((1 << 63) - 1)).astype(object)
    exact = torch.tensor([[-math.log1p(-min(int(one) / 2**63, LARGEST)) for one in row] for row in rest])
    assert float(exact.min()) < 1e-3
    # Near 1 the rest has 24 bits after the point: what is left of it, u, has less.
    small = exact < 1
    assert float(((times - exact).abs() / exact)[small].max()) < 5e-7
    assert float((times - exact).abs().max()) < 1e-3


def test_the_ends_are_cut_so_that_no_time_is_zero_or_infinite() -> None:
    for rest, expected in ((0.0, SMALLEST), (1.0, -math.log(2.0**-24))):
        clamped = torch.tensor([-rest], dtype=torch.float32).clamp_(-LARGEST, -SMALLEST)
        assert float(-clamped.log1p_()) == pytest.approx(expected, rel=1e-6)


def test_keys_of_seeds_and_numbers_are_distinct_and_uniform() -> None:
    seeds, numbers = np.meshgrid(
        np.arange(200, dtype=np.uint64), np.arange(200, dtype=np.uint64), indexing="ij"
    )
    keys = draw_keys(seeds.ravel(), numbers.ravel())
    assert len(np.unique(keys)) == keys.size
    drawn = keys.astype(np.float64).reshape(200, 200) / 2.0**64
    histogram = np.histogram(drawn, 20, (0, 1))[0] / drawn.size
    assert np.abs(histogram - 0.05).max() < 0.005
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02


def test_numbers_are_uniform_and_uncorrelated_over_tokens_positions_and_seeds() -> None:
    noise = Noise(500, CPU)
    of_seed = []
    for seed in (3, 4):
        keys = draw_keys(np.full(400, seed, dtype=np.uint64), np.arange(400, dtype=np.uint64))
        parts = [noise.log_uniforms(keys[i : i + MAX_ROWS]).exp() for i in range(0, 400, MAX_ROWS)]
        of_seed.append(torch.cat([part.clone() for part in parts]).double().numpy())
    u, other = of_seed
    histogram = np.histogram(u, 20, (0, 1))[0] / u.size
    assert np.abs(histogram - 0.05).max() < 0.002
    for left, right in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, other)):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.01
