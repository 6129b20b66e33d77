"""When the launcher lets workers tell of their work."""

from __future__ import annotations

import math

import pytest

from launcher.audience import MAX_SECONDS, Audience


def test_at_first_nobody_looks() -> None:
    assert not Audience().is_there(0.0)


def test_who_looks_is_believed_for_so_long_and_may_say_it_again() -> None:
    audience = Audience()
    assert audience.hear(4.0, 100.0), "it is news"
    assert not audience.hear(4.0, 103.0), "it is none"
    assert audience.is_there(106.9)
    assert not audience.is_there(107.0)
    assert audience.hear(4.0, 110.0)


def test_the_last_who_leaves_says_so() -> None:
    audience = Audience()
    audience.hear(4.0, 100.0)
    assert audience.hear(0.0, 101.0)
    assert not audience.is_there(101.0)
    assert not audience.hear(0.0, 102.0)


@pytest.mark.parametrize("seconds", [math.inf, 1e9])
def test_nobody_is_believed_for_ever(seconds: float) -> None:
    audience = Audience()
    audience.hear(seconds, 100.0)
    assert not audience.is_there(100.0 + MAX_SECONDS)


@pytest.mark.parametrize("seconds", [-5.0, -math.inf])
def test_less_than_no_time_is_none(seconds: float) -> None:
    audience = Audience()
    audience.hear(seconds, 100.0)
    assert not audience.is_there(100.0)
