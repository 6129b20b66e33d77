"""What is decided about all units, without processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from launcher.fleet import Fleet
from launcher.placement import workers
from launcher.units import Child, Phase, Unit, units
from pipeline.wire.base import PoolClosed
from pipeline.wire.control import WorkerReady, WorkerStats
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, VIT_0

PREPROCESS, API = WorkerId(Role.PREPROCESS), WorkerId(Role.API)


def start(unit: Unit, now: float = 0.0) -> None:
    processes: list[Any] = [SimpleNamespace(exit_code=None, kill=lambda: None) for _ in unit.members]
    pairs = zip(unit.members, processes, strict=True)
    unit.begin([Child(worker, unit.epoch, process) for worker, process in pairs], now)
    for child in unit.children.values():
        child.ready = WorkerReady(sender=child.worker, epoch=child.epoch)
    unit.on_ready(now)


@pytest.fixture
def fleet() -> Fleet:
    """Two groups of one rank each, one ViT, preprocess and the endpoint, all serving."""
    made = Fleet(units(workers(1, 2), 1), (0, 1))
    for unit in made.units:
        start(unit)
    return made


def unit_of(fleet: Fleet, worker: WorkerId) -> Unit:
    return next(unit for unit in fleet.units if worker in unit.members)


def report(fleet: Fleet, worker: WorkerId, now: float, num_open_requests: int = 0) -> None:
    child = unit_of(fleet, worker).children[worker]
    child.stats_time = now
    child.stats = WorkerStats(sender=worker, epoch=1, phase="", num_open_requests=num_open_requests)


def reap(fleet: Fleet, worker: WorkerId, now: float = 5.0) -> Unit:
    dead = unit_of(fleet, worker)
    dead.on_death(now)
    for child in dead.children.values():
        child.process.exit_code = -9
    fleet.on_reaped(dead, now, (b"x",))
    return dead


def test_a_message_of_a_dead_incarnation_has_no_sender(fleet: Fleet) -> None:
    message = WorkerStats(sender=VIT_0, epoch=1, phase="")
    vit = unit_of(fleet, VIT_0)
    assert fleet.sender_of(message) == (vit, vit.children[VIT_0])
    reap(fleet, VIT_0)
    assert fleet.sender_of(message) is None
    start(vit)
    assert fleet.sender_of(message) is None
    assert fleet.sender_of(WorkerStats(sender=WorkerId(Role.GATEWAY), epoch=1, phase="")) is None


def test_idle_is_what_preprocess_and_every_group_have_reported_since(fleet: Fleet) -> None:
    for worker in (PREPROCESS, LLM_0, WorkerId(Role.LLM, 1)):
        assert not fleet.is_idle(10.0)
        report(fleet, worker, 11.0)
    assert fleet.is_idle(10.0)
    assert not fleet.is_idle(11.0), "reports from before do not count"
    assert not fleet.is_idle(10.0, API)
    report(fleet, API, 11.0)
    assert fleet.is_idle(10.0, API)
    report(fleet, LLM_0, 12.0, num_open_requests=1)
    assert not fleet.is_idle(10.0)


def test_groups_are_closed_until_all_that_hold_weights_end_at_once(fleet: Fleet) -> None:
    fleet.close_groups()
    ready = {state.worker.role: state.is_ready for state in fleet.states(0.0)}
    assert ready == {Role.LLM: False, Role.VIT: True, Role.PREPROCESS: True, Role.API: True}
    fleet.replace_weights(1.0)
    ending = {unit.role for unit in fleet.units if unit.phase is Phase.ENDING}
    assert ending == {Role.LLM, Role.VIT}
    assert not any(unit.is_closed for unit in fleet.units)


def test_a_successor_waits_until_the_serving_ranks_have_unmapped_the_dead_pool(fleet: Fleet) -> None:
    vit = reap(fleet, VIT_0)
    ranks = {LLM_0, WorkerId(Role.LLM, 1)}
    assert vit.unmapping == ranks
    assert not vit.is_due(5.0)
    fleet.on_pool_closed(PoolClosed(sender=LLM_0, epoch=1, pool_id="vit.0", pool_epoch=2))
    assert vit.unmapping == ranks, "the pool of another epoch"
    fleet.on_pool_closed(PoolClosed(sender=LLM_0, epoch=1, pool_id="vit.0", pool_epoch=1))
    assert vit.unmapping == {WorkerId(Role.LLM, 1)}
    reap(fleet, WorkerId(Role.LLM, 1))
    assert vit.is_due(5.0), "a dead rank maps nothing"
    assert fleet.wakes_at() == 5.0


def test_epochs_count_deaths_and_a_started_pipeline_stays_started(fleet: Fleet) -> None:
    reap(fleet, VIT_0)
    assert fleet.epochs() == {"llm.0": 1, "llm.1": 1, "vit.0": 2, "preprocess.0": 1, "api.0": 1}
    assert (fleet.is_started, fleet.is_serving) == (True, False)


def test_a_worker_that_serves_can_be_killed_alone(fleet: Fleet) -> None:
    killed: list[WorkerId] = []
    for unit in fleet.units:
        for child in unit.children.values():
            child.process = SimpleNamespace(  # type: ignore[assignment]
                exit_code=None, kill=lambda worker=child.worker: killed.append(worker)
            )
    assert fleet.kill(VIT_0)
    assert killed == [VIT_0]
    assert unit_of(fleet, VIT_0).is_serving, "its death is found as any other"


def test_who_does_not_serve_is_not_killed(fleet: Fleet) -> None:
    """A start that is killed counts as one that has failed."""
    reap(fleet, VIT_0)
    assert not fleet.kill(VIT_0)
    assert not fleet.kill(WorkerId(Role.VIT, 7))
