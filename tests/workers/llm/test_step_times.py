from __future__ import annotations

import pytest

from workers.llm.step_times import MIXED_STEPS_IN_A_ROW, Measured, StepTimes

FLAT_THEN_STEEP = [Measured(1, 0.010), Measured(16, 0.010), Measured(32, 0.020), Measured(64, 0.040)]
LONG = [(4096, 0)]


def test_times_between_and_beyond_what_was_measured() -> None:
    times = StepTimes(FLAT_THEN_STEEP, per_pair=1e-6, max_stretch=1.25)
    assert times.predict(1) == times.predict(9) == pytest.approx(0.010)
    assert times.predict(24) == pytest.approx(0.015)
    assert times.predict(128) == pytest.approx(0.080)
    assert times.predict(16, num_pairs=1000) == pytest.approx(0.011)


def test_a_larger_step_never_looks_shorter() -> None:
    times = StepTimes([Measured(1, 0.02), Measured(2, 0.01), Measured(4, 0.03)], 0.0, 1.25)
    assert times.predict(2) == 0.02


def test_exactly_what_fits_rides_along() -> None:
    times = StepTimes(FLAT_THEN_STEEP, per_pair=0.0, max_stretch=1.25)
    assert times.num_free_tokens(1, LONG) == 19  # 20 tokens take 12.5 ms
    assert times.num_free_tokens(16, LONG) == 4
    assert times.num_free_tokens(64, LONG) == 16
    assert StepTimes(FLAT_THEN_STEEP, 1e-6, 1.25).num_free_tokens(1, [(4096, 1000)]) == 2, (
        "attention to a long history costs, too"
    )
    short_then_far = StepTimes(FLAT_THEN_STEEP, 1e-6, 1.25).num_free_tokens(1, [(1, 0), (4096, 1000)])
    assert short_then_far == 1 + 2, "also when somebody with none is in front"
    assert times.num_free_tokens(1, [(3, 0), (2, 0)]) == 5, "no more than there is"
    assert StepTimes(FLAT_THEN_STEEP, 1.0, 1.25).num_free_tokens(1, [(4096, 1000)]) == 1, (
        "prompts must get on"
    )


def test_steps_that_take_longer_than_predicted_make_it_careful_and_back() -> None:
    times = StepTimes(FLAT_THEN_STEEP, 0.0, 1.25)
    before = times.num_free_tokens(4, LONG)
    for _ in range(100):
        times.observe(4, before, 0, 1.2 * times.predict(4 + before))
        times.observe(4, 0, 0, times.predict(4))
    assert times.num_free_tokens(4, LONG) < before
    for _ in range(100):
        times.observe(4, before, 0, times.predict(4 + before))
        times.observe(4, 0, 0, times.predict(4))
    assert before - 1 <= times.num_free_tokens(4, LONG) <= before


def test_where_a_mixed_step_has_its_price_it_is_used_and_paid_for() -> None:
    """As on a GPU: eager steps take 10 ms whatever is in them, graphs of decodes 2 ms."""
    times = StepTimes(
        [Measured(1, 0.0100), Measured(64, 0.0101), Measured(1024, 0.0105), Measured(2048, 0.020)], 0.0, 1.25
    )
    for _ in range(100):
        times.observe(8, 0, 0, 0.002)
    spent, num_steps, num_prompt_tokens, num_mixed = 0.0, 400, 0, 0
    for _ in range(num_steps):
        share = times.num_free_tokens(8, LONG)
        seconds = 0.0105 if share else 0.002
        times.observe(8, share, 0, seconds)
        spent, num_prompt_tokens, num_mixed = (
            spent + seconds,
            num_prompt_tokens + share,
            num_mixed + bool(share),
        )
    assert num_prompt_tokens > 1000 * num_mixed > 0
    assert spent / num_steps < 1.3 * 0.002, "on average streams are stretched no more than they may be"


def test_outliers_are_forgotten_when_what_it_allows_is_what_is_done() -> None:
    times = StepTimes(
        [Measured(1, 0.020), Measured(2, 0.0225), Measured(4, 0.027), Measured(8, 0.036)], 0.0, 1.25
    )
    before = times.num_free_tokens(1, LONG)
    for _ in range(3):
        times.observe(1, times.num_free_tokens(1, LONG) or 1, 0, 0.1)
    for _ in range(1000):
        share = times.num_free_tokens(1, LONG)
        times.observe(1, share, 0, times.predict(1 + share))
    assert (times.num_free_tokens(1, LONG) or before) == before


def test_a_machine_that_is_slower_as_a_whole_changes_nothing() -> None:
    times = StepTimes(FLAT_THEN_STEEP, 0.0, 1.25)
    before = times.num_free_tokens(4, LONG)
    for _ in range(200):
        share = times.num_free_tokens(4, LONG)
        times.observe(4, share, 0, 3 * times.predict(4 + share))
    assert before - 1 <= (times.num_free_tokens(4, LONG) or before) <= before + 1


def test_now_and_then_a_step_goes_without_prefill() -> None:
    times = StepTimes(FLAT_THEN_STEEP, 0.0, 1.25)
    for _ in range(MIXED_STEPS_IN_A_ROW):
        assert times.num_free_tokens(1, LONG) > 0
        times.observe(1, 5, 0, 0.011)
    assert times.num_free_tokens(1, LONG) == 0
    times.observe(1, 0, 0, 0.010)
    assert times.num_free_tokens(1, LONG) > 0


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no measured step"):
        StepTimes([], 0.0, 1.25)
