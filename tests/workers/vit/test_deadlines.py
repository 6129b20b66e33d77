"""Deadlines of calls that give no sign of life."""

from __future__ import annotations

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from workers.vit.deadlines import MARGIN, UNMEASURED_FLOP_PER_S, Deadlines
from workers.vit.models.registry import tower_of


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.announced: list[float] = []

    def __call__(self) -> float:
        return self.now


def run(deadlines: Deadlines, clock: Clock, flop: float, seconds: float) -> float:
    """The deadline that was announced."""
    with deadlines.around(flop):
        clock.now += seconds
        announced = clock.announced[-1]
    assert clock.announced[-1] == 0.0
    return announced


def test_a_deadline_is_ten_times_what_was_measured_and_the_patience() -> None:
    clock = Clock()
    deadlines = Deadlines(clock.announced.append, 120.0, clock)
    assert run(deadlines, clock, 1e9, 2.0) == pytest.approx(120 + MARGIN * 1e9 / UNMEASURED_FLOP_PER_S)
    assert run(deadlines, clock, 5e9, 10.0) == pytest.approx(120 + MARGIN * 10.0)
    for _ in range(60):
        run(deadlines, clock, 1e9, 20.0)  # the cores are others' now
    assert run(deadlines, clock, 2e9, 40.0) == pytest.approx(120 + MARGIN * 40.0, rel=0.01)


def test_a_call_that_fails_has_no_deadline_any_more() -> None:
    clock = Clock()
    deadlines = Deadlines(clock.announced.append, 1.0, clock)
    with pytest.raises(RuntimeError), deadlines.around(1e9):
        raise RuntimeError
    assert clock.announced[-1] == 0.0


def test_attention_counts_by_its_square() -> None:
    info = read_model_info(EMBEDDED / "model")
    preparation = tower_of(info).preparation(info.vision)
    small, large = preparation.flop(10_000), preparation.flop(100_000)
    assert 50 < large / small < 100
