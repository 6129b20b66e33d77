"""Who computes alone has all cores, and gives them back at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.process.core_sharing import (
    HOLD_S,
    MAX_WAIT_S,
    POLL_S,
    Activity,
    CoreSharing,
    pin_all_threads,
)
from pipeline.process.process import Placement
from pipeline.wire.topology import Role, WorkerId

LLM, VIT = WorkerId(Role.LLM), WorkerId(Role.VIT, 3)


class Machine:
    def __init__(self, run_dir: Path) -> None:
        self.now, self.run_dir = 0.0, run_dir
        self.told: list[object] = []
        self.meanwhile: list[Callable[[], object]] = []  # what others do while one sleeps

    def sharing(self, worker: WorkerId, wide: Sequence[int] = (0, 1, 2, 3)) -> CoreSharing:
        place = Placement(cores=(0, 1, 2), num_threads=3, wide_cores=tuple(wide))
        return CoreSharing(
            Activity(self.run_dir),
            worker,
            place,
            self.told.append,
            lambda: self.now,
            self.told.append,
            self.sleep,
        )

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for call in self.meanwhile[:1]:
            self.meanwhile.remove(call)
            call()


def test_cores_are_taken_after_a_while_and_given_back_at_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = machine.sharing(LLM), machine.sharing(VIT)
    assert not llm.adapt(), "the others may only just have stopped"
    machine.now += 1.01 * HOLD_S
    assert llm.adapt()
    assert machine.told == [(0, 1, 2, 3), 4]
    assert llm.adapt()
    assert len(machine.told) == 2, "nothing is set twice"
    vit.announce(True)
    assert not llm.adapt()
    assert machine.told[2:] == [(0, 1, 2), 3]
    vit.announce(False)
    assert not llm.adapt()
    machine.now += HOLD_S / 2
    vit.announce(True)
    assert not llm.adapt()
    vit.announce(False)
    machine.now += 1.01 * HOLD_S
    assert not llm.adapt(), "it counts from when the idleness was seen"
    machine.now += 1.01 * HOLD_S
    assert llm.adapt()


def test_only_the_other_kind_counts_and_all_of_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit, other = machine.sharing(LLM), machine.sharing(VIT), machine.sharing(WorkerId(Role.VIT, 0))
    machine.now = 1.01 * HOLD_S
    vit.adapt()
    llm.adapt()
    machine.now += 1.01 * HOLD_S
    other.announce(True)
    assert vit.adapt()
    assert not llm.adapt()
    llm.announce(True)
    assert not vit.adapt()


def test_who_died_at_work_is_forgotten_when_the_successor_begins(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm = machine.sharing(LLM)
    machine.sharing(VIT).announce(True)
    machine.sharing(VIT)
    llm.adapt()
    machine.now = 1.01 * HOLD_S
    assert llm.adapt()


def widen(machine: Machine, sharing: CoreSharing) -> None:
    sharing.adapt()
    machine.now += 1.01 * HOLD_S
    assert sharing.enter()


def test_who_begins_waits_until_its_cores_are_free(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = machine.sharing(LLM), machine.sharing(VIT)
    widen(machine, llm)
    start = machine.now
    machine.meanwhile = [lambda: None, lambda: None, llm.adapt]  # its step goes on for two polls more
    assert not vit.enter()
    assert machine.now - start == pytest.approx(3 * POLL_S)
    assert not llm.is_wide


def test_nobody_waits_for_ever_and_two_that_take_all_at_once_both_give_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = machine.sharing(LLM), machine.sharing(VIT)
    widen(machine, llm)
    start = machine.now
    assert not vit.enter()
    assert machine.now - start == pytest.approx(MAX_WAIT_S, rel=0.1), "a step that long is not waited for"
    llm.announce(False)
    vit.announce(False)
    llm.widen(False)
    for sharing in (llm, vit):
        sharing.adapt()
    machine.now += 1.01 * HOLD_S
    assert vit.adapt()
    assert llm.adapt(), "neither has begun"
    vit.announce(True)
    machine.meanwhile = [vit.adapt]
    assert not llm.enter()
    assert not vit.is_wide


def test_fixed_cores_stay_as_they_are(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm = machine.sharing(LLM, wide=())
    llm.adapt()
    machine.now = 10 * HOLD_S
    assert not llm.adapt()
    assert machine.told == []


def test_threads_that_are_there_already_move_too() -> None:
    cores = sorted(os.sched_getaffinity(0))
    seen: list[set[int]] = []
    begin, end = threading.Event(), threading.Event()

    def run() -> None:
        begin.set()
        end.wait()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    begin.wait()
    try:
        pin_all_threads(cores[:1])
        end.set()
        thread.join()
        assert seen == [set(cores[:1])]
    finally:
        pin_all_threads(cores)
