from __future__ import annotations

from tools.bench_tensors import SIZES, measure


def test_a_handle_costs_the_same_whatever_its_size() -> None:
    """Far from the figures that the tool tells: only that nothing of the tensor is copied on the way.

    The least of three runs: other tests beside this one take the cores away.
    """
    runs = [measure(7) for _ in range(3)]
    assert [nbytes for nbytes, _, _ in runs[0]] == list(SIZES)
    by_handle = [min(run[index][1] for run in runs) for index in range(len(SIZES))]
    inline = min(run[-1][2] for run in runs)
    assert max(by_handle) < 50 * min(by_handle), "the largest is a thousand times the smallest"
    assert inline > 5 * by_handle[-1]
