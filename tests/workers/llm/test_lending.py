"""How long the ViTs compute between two steps."""

from __future__ import annotations

import pytest

from workers.llm.lending import CROWDED_STRETCH, LONGEST_S, Lending, Loan
from workers.llm.step_times import Measured, StepSeconds, StepTimes

TIMES = StepTimes([Measured(1, 0.02), Measured(64, 0.083)], 0.0, 1.25)  # a millisecond for each further token
STREAM = StepSeconds(1, 1, 0.02)


def test_beside_streams_it_is_what_their_stretch_leaves_of_the_next_step() -> None:
    lending = Lending()
    assert lending.behind(STREAM, TIMES, False, 1) == Loan(pytest.approx(0.005), True)
    more, slow = StepSeconds(5, 5, 0.024), StepSeconds(1, 1, 0.1)
    assert lending.behind(more, TIMES, False, 1) == Loan(pytest.approx(0.006), True)
    assert lending.behind(slow, TIMES, False, 1) == Loan(pytest.approx(0.005), True)


def test_prompts_and_pictures_stretch_the_gaps_of_streams_in_turn() -> None:
    lending = Lending()
    loans = [lending.behind(STREAM, TIMES, True, 1) for _ in range(4)]
    assert [loan.defers_prefill for loan in loans] == [True, False, True, False]
    assert [loan.seconds for loan in loans] == [pytest.approx(0.005), 0, pytest.approx(0.005), 0]


def test_half_of_the_time_is_lent_where_no_stream_runs_or_prompts_may_do_as_they_like() -> None:
    lending = Lending()
    assert lending.behind(StepSeconds(0, 0, 0.08), TIMES, True, 0) == Loan(0.08)
    assert lending.behind(STREAM, None, True, 0) == Loan(0.02)
    assert lending.behind(StepSeconds(1, 1, 3.0), None, True, 0) == Loan(LONGEST_S)


def test_where_more_wait_than_run_both_may_stretch_the_gaps_further() -> None:
    lending = Lending()
    twice = Loan(pytest.approx(0.02), defers_prefill=True)
    assert lending.behind(STREAM, TIMES, True, 2) == twice
    assert lending.behind(STREAM, TIMES, True, 2) == Loan(0.0, stretch=CROWDED_STRETCH)
    assert lending.behind(STREAM, TIMES, False, 2) == twice
    assert lending.behind(STREAM, TIMES, False, 1).seconds == pytest.approx(0.005), "no more than run"
