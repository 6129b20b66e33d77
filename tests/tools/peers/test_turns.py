from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.peers import turns
from tools.peers.turns import MAX_TRIES, Meter, locked
from tools.peers.usage import CpuTime, Moment


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the seconds of CPU that others use in each figure of ten seconds to come."""

    def script(*seconds: float) -> None:
        def moments() -> Iterator[Moment]:
            for used in seconds:
                yield Moment(0.0, CpuTime(0.0, 0.0), 0.0)
                yield Moment(10.0, CpuTime(5.0 + used, 0.0), 5.0)

        scripted = moments()
        monkeypatch.setattr(turns, "look", lambda root: next(scripted))
        monkeypatch.setattr(turns, "wait_for_quiet", lambda limit, timeout_s: 0.0)
        monkeypatch.setattr(turns.os, "cpu_count", lambda: 2)

    return script


def test_a_figure_is_taken_again_when_others_used_the_cores(others: Callable[..., None]) -> None:
    others(2.0, 0.2)
    values = iter([1.0, 2.0])
    assert Meter(0.03, root=1).figure(lambda: next(values)) == (2.0, pytest.approx(0.01))


def test_a_figure_is_refused_when_others_do_not_stop(others: Callable[..., None]) -> None:
    others(*[2.0] * MAX_TRIES)
    assert Meter(0.03, root=1).figure(lambda: 1.0) == (None, pytest.approx(0.1))


def test_turns_of_different_programs_exclude_each_other(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path), path.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(None):
        pass
