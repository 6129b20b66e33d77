from __future__ import annotations

import numpy as np
import pytest
import torch

from tools.memory_rate import Buffer, compare_halves, find_zero, kernel_rates, kernels, memory_rate

MIB = 1 << 20


def test_the_rate_is_that_of_the_fastest_kernel() -> None:
    found = memory_rate(2 * MIB, repeats=2)
    rates = kernel_rates(2 * MIB, repeats=1)
    assert found.kernel in rates
    assert found.bytes_per_s > 0
    assert all(rate > 0 for rate in rates.values())


def test_kernels_read_the_whole_buffer() -> None:
    buffer = Buffer(MIB, num_threads=2)
    calls = kernels(buffer)
    assert torch.isclose(
        torch.as_tensor(calls["torch.sum float32"]()), torch.tensor(1.4 * MIB / 4), rtol=1e-3
    )
    parts: list[int] = []
    buffer.in_threads(lambda part: parts.append(part.nbytes))
    assert parts == [MIB // 2, MIB // 2]


def test_searches_see_what_is_there() -> None:
    """Else a library might read nothing."""
    block = np.full(MIB, 1, np.uint8)
    find_zero(block)
    compare_halves(block)
    block[-1] = 0
    with pytest.raises(AssertionError):
        find_zero(block)
    with pytest.raises(AssertionError):
        compare_halves(block)
