"""The life of units, without processes."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.placement import workers
from launcher.units import (
    MAX_DELAY_S,
    MAX_FAILED_STARTS,
    MAX_UNMAP_S,
    STABLE_S,
    Child,
    Phase,
    Unit,
    has_moved,
    units,
)
from pipeline.process.flight_recorder import FlightRecorder
from pipeline.wire.control import WorkerReady, WorkerStats
from pipeline.wire.metrics import Metric
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, VIT_0

SECONDS = Metric("stage_vit_seconds", "histogram", "Seconds", (1.0,), (4, 1), 3.5)
RANKS = (WorkerId(Role.LLM, 0), WorkerId(Role.LLM, 1))


def process() -> Any:
    return SimpleNamespace(exit_code=None)


def start(unit: Unit, now: float) -> None:
    unit.begin([Child(worker, unit.epoch, process()) for worker in unit.members], now)
    for child in unit.children.values():
        assert not unit.is_serving
        child.ready = WorkerReady(sender=child.worker, epoch=child.epoch, credits=3, details={"port": 7})
        unit.on_ready(now)
    assert unit.is_serving


def die(unit: Unit, now: float, mapped_by: set[WorkerId] | None = None) -> None:
    unit.on_death(now)
    assert not unit.is_reaped
    for child in unit.children.values():
        child.process.exit_code = -9
    assert unit.is_reaped
    unit.on_reaped(now, (b"x",), mapped_by or set())


def test_ranks_of_a_group_are_one_unit_and_others_stand_alone() -> None:
    found = [unit.members for unit in units(workers(2, 4), 2)]
    assert found[:2] == [RANKS, (WorkerId(Role.LLM, 2), WorkerId(Role.LLM, 3))]
    assert {len(members) for members in found[2:]} == {1}
    assert len(found) == 6


def test_a_death_is_told_by_the_next_epoch_once_all_are_reaped() -> None:
    unit = Unit(RANKS)
    start(unit, 0.0)
    assert [(state.epoch, state.is_ready, state.credits) for state in unit.states()] == [(1, True, 3)] * 2
    unit.on_death(1.0)
    assert [(state.epoch, state.is_ready) for state in unit.states()] == [(1, False)] * 2, (
        "some may still live"
    )
    for child in unit.children.values():
        assert not unit.is_reaped
        child.process.exit_code = -9
    unit.on_reaped(1.0, (b"x",), set())
    assert [(state.epoch, state.is_ready, state.executed) for state in unit.states()] == [
        (2, False, (b"x",))
    ] * 2
    assert unit.phase is Phase.DOWN


def test_the_first_death_is_a_killed_rank_or_else_the_first_that_reported_an_error() -> None:
    unit = Unit(RANKS)
    start(unit, 0.0)
    assert not unit.has_dead_member
    first, second = unit.children.values()
    first.process.exit_code, first.error, first.error_time = 1, "the other rank is gone", 2.0
    assert unit.has_dead_member
    assert unit.first_death() == (1, "llm.0 exited with code 1: the other rank is gone")
    second.process.exit_code, second.error, second.error_time = 1, "out of memory", 1.0
    assert unit.first_death() == (1, "llm.1 exited with code 1: out of memory")
    second.process.exit_code, second.error = -signal.SIGSEGV, ""
    assert unit.first_death() == (-signal.SIGSEGV, "llm.1 was killed by SIGSEGV")
    second.process.exit_code = -signal.SIGKILL
    assert unit.first_death()[1] == "llm.1 was killed by SIGKILL"
    unit.phase = Phase.STARTING
    assert unit.first_death()[1].endswith("SIGKILL while it started, most likely for lack of memory")
    unit.is_killed = True
    assert unit.first_death()[1] == "llm.1 was killed by SIGKILL", "not of the launcher's own kill"
    unit.phase = Phase.SERVING
    unit.on_death(3.0)
    assert not unit.has_dead_member, "the death is known"


def test_restarts_back_off_until_one_has_lasted() -> None:
    unit, delays = Unit((VIT_0,)), []
    for _ in range(9):
        start(unit, 100.0)
        die(unit, 101.0)
        delays.append(unit.wakes_at() - 101.0)
    assert delays[0] == 0
    assert delays[1:] == sorted(delays[1:])
    assert 0 < delays[1] < 1
    assert delays[-1] == MAX_DELAY_S
    start(unit, 200.0)
    die(unit, 200.0 + STABLE_S)
    assert unit.wakes_at() == 200.0 + STABLE_S


def fail(unit: Unit, code: int, has_worked: bool = False, now: float = 1.0) -> bool:
    """The unit ends with this exit code, in whatever phase it is. Whether it is given up."""
    is_given_up = unit.on_death(now, code, has_worked)
    for child in unit.children.values():
        child.process.exit_code = code
    unit.on_reaped(now, (), set())
    return is_given_up


def begin(unit: Unit) -> None:
    unit.begin([Child(worker, unit.epoch, process()) for worker in unit.members], 0.0)


def test_a_first_start_that_ends_by_itself_is_given_up_at_once_and_a_killed_one_is_tried_again() -> None:
    unit = Unit((VIT_0,))
    begin(unit)
    assert fail(unit, 1)
    unit, found = Unit((VIT_0,)), []
    for _ in range(MAX_FAILED_STARTS):
        begin(unit)
        found.append(fail(unit, -9))
    assert found == [False] * (MAX_FAILED_STARTS - 1) + [True]


@pytest.mark.parametrize("code", [0, 1, -signal.SIGSEGV])
def test_who_is_ready_and_ends_before_it_has_done_anything_has_failed_to_start(code: int) -> None:
    unit, found = Unit((VIT_0,)), []
    for _ in range(MAX_FAILED_STARTS):
        start(unit, 0.0)
        found.append(fail(unit, code))
    assert found == [False] * (MAX_FAILED_STARTS - 1) + [True]


def test_who_has_worked_or_served_for_long_is_never_given_up() -> None:
    for has_worked, now in ((True, 1.0), (False, STABLE_S)):
        unit = Unit((VIT_0,))
        start(unit, 0.0)
        assert not fail(unit, 1, has_worked, now)
        assert not any((start(unit, now), fail(unit, 1, now=now))[1] for _ in range(3 * MAX_FAILED_STARTS))
        assert unit.wakes_at() == now + MAX_DELAY_S, "but it backs off"


def test_a_restart_that_fails_is_tried_again_for_ever_and_backs_off() -> None:
    """Though it has served only for a moment: others may be at work."""
    unit, delays = Unit((VIT_0,)), []
    start(unit, 0.0)
    assert not fail(unit, -9)
    for _ in range(4 * MAX_FAILED_STARTS):
        begin(unit)
        assert not fail(unit, 1)
        delays.append(unit.wakes_at() - 1.0)
    assert delays == sorted(delays)
    assert delays[-1] == MAX_DELAY_S


def test_who_is_killed_from_outside_has_not_failed() -> None:
    unit = Unit((VIT_0,))
    for _ in range(3 * MAX_FAILED_STARTS):
        start(unit, 0.0)
        assert not fail(unit, -signal.SIGKILL)


def test_the_successor_waits_until_the_dead_ones_memory_is_closed_but_not_for_ever() -> None:
    unit = Unit((VIT_0,))
    start(unit, 100.0)
    die(unit, 150.0, mapped_by={LLM_0})
    assert unit.wakes_at() == 150.0 + MAX_UNMAP_S
    unit.unmapping.discard(LLM_0)
    assert unit.wakes_at() == 150.0


def test_states_carry_what_a_worker_counts() -> None:
    unit = Unit((VIT_0,))
    start(unit, 0.0)
    unit.children[VIT_0].stats = WorkerStats(
        sender=VIT_0,
        epoch=1,
        phase="serving",
        num_open_requests=2,
        counters={"encodes": 5},
        metrics=(SECONDS,),
    )
    (state,) = unit.states()
    assert (state.num_open_requests, state.counters) == (2, {"port": 7, "encodes": 5})
    assert state.metrics == (SECONDS,)
    unit.children[VIT_0].stats_time = 100.0
    assert [state.silent_s for state in unit.states(102.5)] == [2.5]


def test_who_says_nothing_while_it_starts_is_late_whatever_others_say() -> None:
    unit = Unit((VIT_0,))
    unit.begin([Child(VIT_0, 1, process())], 100.0)
    assert not unit.is_late(109.0, 10.0)
    unit.news_at = 109.0
    assert not unit.is_late(118.0, 10.0)
    assert unit.is_late(120.0, 10.0)
    start(unit, 120.0)
    assert not unit.is_late(500.0, 10.0)


def test_a_long_start_is_told_of_once_a_minute() -> None:
    """A ViT may build an engine for a quarter of an hour, and an LLM waits for it.

    Neither is late, nor silent.
    """
    vit, llm = Unit((VIT_0,)), Unit((LLM_0,))
    begin(vit)
    begin(llm)
    reports: list[str] = []
    for now in range(1, 901):
        for unit, phase in ((vit, "loading weights"), (llm, "waiting for vit.0")):
            unit.news_at = now  # as each word of it does
            stats = WorkerStats(sender=VIT_0, epoch=1, phase=phase, done=now, total=900)
            unit.children[unit.members[0]].stats = stats
            reports += filter(None, [unit.report(now)])
            assert not unit.is_late(now, 600.0)
    assert len(reports) == 30
    assert reports[:2] == [
        "vit.0 has been starting for 60 s: loading weights, 60 of 900",
        "llm.0 has been starting for 60 s: waiting for vit.0, 60 of 900",
    ]
    assert llm.is_late(1501, 600.0), "unless they stop telling"
    for child in vit.children.values():
        child.ready = WorkerReady(sender=VIT_0, epoch=1)
    vit.on_ready(901)
    assert vit.report(2000) == "", "it serves"


def test_who_gives_no_sign_of_life_stands_still(tmp_path: Path) -> None:
    recorder, child = FlightRecorder(tmp_path, VIT_0), Child(VIT_0, 1, process())
    assert has_moved(child, recorder, 10.0, 5.0)
    assert has_moved(child, recorder, 14.9, 5.0)
    assert not has_moved(child, recorder, 15.1, 5.0)
    recorder.move()
    assert has_moved(child, recorder, 15.2, 5.0)
    recorder.close()


def test_whoever_announced_a_long_call_stands_still_only_after_its_deadline(tmp_path: Path) -> None:
    recorder, child = FlightRecorder(tmp_path, VIT_0), Child(VIT_0, 1, process())
    now = time.monotonic()
    assert has_moved(child, recorder, now, 5.0)
    recorder.expect(100.0)
    assert has_moved(child, recorder, now + 90.0, 5.0)
    assert not has_moved(child, recorder, now + 101.0, 5.0), "a deadlock comes to light"
    recorder.expect(0)
    assert has_moved(child, recorder, now + 102.0, 5.0)
    assert not has_moved(child, recorder, now + 108.0, 5.0)
    recorder.close()
