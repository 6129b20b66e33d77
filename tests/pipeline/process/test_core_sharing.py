"""Who computes alone has all cores, and gives them back at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.process.core_sharing import (
    HOLD_S,
    MAX_WAIT_S,
    PAUSED,
    POLL_S,
    TURN_POLL_S,
    WIDE,
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

    def sharing(
        self, worker: WorkerId, wide: Sequence[int] = (0, 1, 2, 3), takes_turns: bool = False
    ) -> CoreSharing:
        place = Placement(
            cores=(0, 1, 2), num_threads=3, wide_cores=tuple(wide), takes_turns=takes_turns
        )  # fmt: skip
        return CoreSharing(
            Activity(self.run_dir),
            worker,
            place,
            self.told.append,
            lambda: self.now,
            self.told.append,
            self.sleep,
            self.sleep if takes_turns else None,
            (lambda cores: self.told.append("a core each")) if takes_turns else lambda cores: None,
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


# Turns.


def turns(machine: Machine) -> tuple[CoreSharing, CoreSharing]:
    llm, vit = (machine.sharing(worker, takes_turns=True) for worker in (LLM, VIT))
    return llm, vit


def state_of(machine: Machine, role: Role) -> int:
    return Activity(machine.run_dir).busiest(role)


def test_a_vit_has_all_cores_at_once_while_the_llm_is_idle(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    _, vit = turns(machine)
    assert vit.enter()
    assert machine.told == [(0, 1, 2, 3), 4, "a core each"]
    assert machine.now == 0
    machine.now = 9.0
    assert vit.adapt()
    assert machine.now == 9.0, "nobody waits for the cores, however long it computes"
    assert not vit.is_hurried


def test_a_vit_pauses_until_the_llm_lends_the_cores(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = turns(machine)
    assert llm.enter()
    assert not llm.is_awaited
    seen: list[tuple[int, bool]] = []

    def end_step() -> None:
        seen.append((state_of(machine, Role.VIT), llm.is_awaited))
        llm.leave()

    def lend() -> None:
        llm.announce(True)
        Activity(tmp_path).lent_until = machine.now + 0.010

    machine.meanwhile = [end_step, lend]
    assert vit.enter()
    assert seen == [(PAUSED, True)], "it waits for the LLM, which then asks whether it does"
    assert machine.meanwhile == []
    assert state_of(machine, Role.VIT) == WIDE
    assert vit.is_hurried
    machine.now += 0.004
    before = machine.now
    vit.adapt()
    assert machine.now == before, "the next block of 4 ms ends in time"
    machine.now += 0.005
    machine.meanwhile = [lambda: seen.append((state_of(machine, Role.VIT), llm.is_awaited)), lend]
    vit.adapt()
    assert seen[1:] == [(PAUSED, True)]
    assert state_of(machine, Role.VIT) == WIDE
    machine.now += 1.0
    machine.meanwhile = [lambda: llm.announce(False)]
    vit.adapt()
    assert machine.meanwhile == [], "an idle LLM lends its cores without an end"


def test_a_block_longer_than_a_turn_has_one_turn_all_the_same(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = turns(machine)
    llm.enter()
    llm.leave()

    def lend() -> None:
        Activity(tmp_path).lent_until = machine.now + 0.010

    machine.meanwhile = [lend]
    vit.enter()
    for _ in range(3):
        machine.now += 0.1
        machine.meanwhile = [lambda: None, lend]
        vit.adapt()
        assert machine.meanwhile == []
        assert state_of(machine, Role.VIT) == WIDE


def test_the_llm_waits_for_the_end_of_a_block_and_not_for_ever(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = turns(machine)
    vit.enter()
    machine.meanwhile = [lambda: None, vit.leave]
    assert llm.enter()
    assert machine.now == pytest.approx(2 * TURN_POLL_S)
    llm.announce(False)
    vit.enter()
    start = machine.now
    assert llm.enter()
    assert machine.now - start == pytest.approx(MAX_WAIT_S, rel=0.1)


def test_cores_are_lent_for_as_long_as_somebody_has_work(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    llm, vit = turns(machine)
    llm.enter()
    llm.leave()
    llm.lend(5.0)
    assert machine.now == 0, "to nobody"
    vit.announce(True)
    llm.lend(0.0)
    assert machine.now == 0, "there is no time left"
    llm.lend(0.05)
    assert machine.now == pytest.approx(0.05)
    machine.meanwhile = [lambda: None, lambda: vit.announce(False)]
    llm.lend(5.0)
    assert machine.now == pytest.approx(0.05 + 2 * POLL_S)


def test_two_processes_take_turns(tmp_path: Path) -> None:
    """With real clocks and bells: neither computes while the other does, and both get on."""
    place = Placement(cores=(0,), num_threads=1, wide_cores=(0, 1), takes_turns=True)

    def sharing(worker: WorkerId) -> CoreSharing:
        return CoreSharing(Activity(tmp_path), worker, place, lambda n: None, set_cores=lambda cores: None)

    llm, vit = sharing(LLM), sharing(VIT)
    computing: set[str] = set()
    both, blocks, is_over = [], [], threading.Event()

    def compute(name: str, seconds: float) -> None:
        computing.add(name)
        time.sleep(seconds)
        both.append(len(computing) > 1)
        computing.discard(name)

    def encode() -> None:
        vit.announce(True)
        vit.enter()
        while not is_over.is_set():
            compute("vit", 0.001)
            blocks.append(1)
            vit.adapt()
        vit.announce(False)

    thread = threading.Thread(target=encode)
    thread.start()
    for _ in range(30):
        llm.enter()
        compute("llm", 0.004)
        llm.leave()
        llm.announce(True)
        llm.lend(0.004)
    is_over.set()
    llm.announce(False)
    thread.join()
    assert len(blocks) >= 30
    assert not any(both)
