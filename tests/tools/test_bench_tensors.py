from __future__ import annotations

from tools.bench_tensors import SIZES, measure


def test_a_handle_costs_the_same_whatever_its_size() -> None:
    """Far from the figures that the tool tells: only that nothing of the tensor is copied on the way."""
    found = measure(20)
    assert [nbytes for nbytes, _, _ in found] == list(SIZES)
    by_handle = [seconds for _, seconds, _ in found]
    assert max(by_handle) < 10 * min(by_handle), "the largest is a thousand times the smallest"
    _, handle, inline = found[-1]
    assert inline > 5 * handle
