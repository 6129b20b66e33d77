"""How long the ViTs compute between two steps."""

from __future__ import annotations

import pytest

from workers.llm.lending import CROWDED_STRETCH, LONGEST_S, Lending, Loan
from workers.llm.step_times import Measured, StepSeconds, StepTimes

TIMES = StepTimes([Measured(1, 0.02), Measured(64, 0.083)], 0.0, 1.25)  # a millisecond for each further token
STREAM = StepSeconds(1, 1, 0.02)


def test_beside_streams_it_is_what_their_stretch_leaves_of_the_next_step() -> None:
    lending = Lending()
    assert lending.behind(STREAM, TIMES, False, True) == Loan(pytest.approx(0.005), True)
    more, slow = StepSeconds(5, 5, 0.024), StepSeconds(1, 1, 0.1)
    assert lending.behind(more, TIMES, False, True) == Loan(pytest.approx(0.006), True)
    assert lending.behind(slow, TIMES, False, True) == Loan(pytest.approx(0.005), True)
    assert lending.behind(more, TIMES, True, False) == Loan(0.0), "no ViT has work"


def test_prompts_and_pictures_stretch_the_gaps_of_streams_in_turn() -> None:
    lending = Lending()
    loans = [lending.behind(STREAM, TIMES, True, True) for _ in range(4)]
    assert [loan.defers_prefill for loan in loans] == [True, False, True, False]
    assert [loan.seconds for loan in loans] == [pytest.approx(0.005), 0, pytest.approx(0.005), 0]


def test_half_of_the_time_is_lent_where_no_stream_runs_or_prompts_may_do_as_they_like() -> None:
    lending = Lending()
    assert lending.behind(StepSeconds(0, 0, 0.08), TIMES, True, True) == Loan(0.08)
    assert lending.behind(StepSeconds(0, 0, 0.08), TIMES, True, False) == Loan(0.0)
    assert lending.behind(STREAM, None, True, True) == Loan(0.02)
    assert lending.behind(StepSeconds(1, 1, 3.0), None, True, True) == Loan(LONGEST_S)


def test_in_a_crowd_both_may_stretch_the_gaps_further_until_none_waits() -> None:
    lending = Lending()

    def behind(num_waiting: int, has_prefill: bool = False, is_awaited: bool = True) -> Loan:
        lending.observe(STREAM, num_waiting)
        return lending.behind(STREAM, TIMES, has_prefill, is_awaited)

    longer = Loan(pytest.approx(0.06), defers_prefill=True)
    assert behind(1).seconds == pytest.approx(0.005), "no more than run"
    assert behind(2) == longer
    assert behind(2, has_prefill=True) == Loan(0.0, stretch=CROWDED_STRETCH)
    assert behind(1) == longer
    assert behind(1, is_awaited=False) == Loan(0.0, stretch=CROWDED_STRETCH), "all pictures are encoded"
    assert behind(0).seconds == pytest.approx(0.005)
    assert behind(1).seconds == pytest.approx(0.005)
