"""How long the ViTs compute between two steps."""

from __future__ import annotations

import pytest

from workers.llm.lending import LONGEST_S, Lending, Loan
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


def test_half_of_the_time_is_lent_where_there_is_little_to_protect() -> None:
    lending = Lending()
    prefill = StepSeconds(0, 0, 0.08)
    assert lending.behind(prefill, TIMES, True, 0) == Loan(pytest.approx(0.08), False)
    assert lending.behind(STREAM, TIMES, True, 2) == Loan(0.02, False), "two wait, one runs"
    assert lending.behind(STREAM, None, True, 0) == Loan(0.02, False), "prompts may do as they like, too"
    assert lending.behind(StepSeconds(1, 1, 3.0), None, True, 0) == Loan(LONGEST_S, False)
