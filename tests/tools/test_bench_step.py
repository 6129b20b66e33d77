from __future__ import annotations

from tools.bench_step import measure


def test_all_sequences_decode_while_steps_are_timed() -> None:
    """Far from the figures that the tool prints."""
    found = measure(3, context=100, num_steps=5)
    assert found.num_sequences == 3
    assert found.step_us > 0
    assert found.plan_bytes > 0
