"""What the head decides about other nodes, and a node about itself, without sockets or clocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from launcher.members import difference, doors_of, node_spec, shared_options
from launcher.membership import Membership, NodeEnded
from launcher.nodes import Nodes, executed_by, has_worked
from launcher.units import Phase, Unit
from pipeline.config import ClusterConfig, Config, LlmConfig, VitConfig
from pipeline.wire.control import PipelineState, WorkerFailed, WorkerReady, WorkerStats
from pipeline.wire.nodes import (
    JoinRefused,
    JoinRequest,
    NodeOrders,
    NodeReport,
    StatusPassedOn,
    WorkerReport,
)
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS, VIT_0, FakePublisher, FakeSink

LLM_1, VIT_1 = WorkerId(Role.LLM, 1), WorkerId(Role.VIT, 1)
URLS = {"llm.1": "tcp://10.0.0.2:4000"}
STATE = PipelineState(workers=())


def join(node_id: bytes = b"a" * 16, **changes: Any) -> JoinRequest:
    request = JoinRequest(
        node_id=node_id, node_rank=1, version="1", checkpoint="c", options={"tp": "1"}, public_key=b"k"
    )
    return msgspec.structs.replace(request, **changes)


class Rig:
    """A head with one group and one ViT on node 1."""

    def __init__(self) -> None:
        self.units = [Unit((LLM_1,), (1,), is_absent=True), Unit((VIT_1,), (1,), is_absent=True)]
        self.inbox: list[Any] = []
        self.publisher = FakePublisher()
        reports: Any = SimpleNamespace(receive=self._receive)
        orders: Any = SimpleNamespace(publish=self.publisher, subscriptions=list)
        self.nodes = Nodes({1: self.units}, b"h", join(b""), reports, orders, timeout_s=10)

    def _receive(self) -> Any:
        return SimpleNamespace(message=self.inbox.pop(0)) if self.inbox else None

    def hear(self, *messages: Any, now: float = 0.0) -> list[Any]:
        self.inbox += messages
        return self.nodes.read(now)

    def report(self, *workers: WorkerReport, number: int = 1, now: float = 0.0, **flags: bool) -> list[Any]:
        return self.hear(NodeReport(node_id=b"a" * 16, number=number, workers=workers, **flags), now=now)

    def orders(self) -> NodeOrders:
        self.nodes.publish(STATE)
        (found,) = self.publisher.take(NodeOrders)
        assert isinstance(found, NodeOrders)
        return found


@pytest.fixture
def rig() -> Rig:
    made = Rig()
    made.hear(join())
    return made


def start(rig: Rig, unit: Unit) -> None:
    unit.begin([rig.nodes.fork(1, worker, unit.epoch) for worker in unit.members], 0.0)


def test_a_node_that_joins_gets_what_its_units_need(rig: Rig) -> None:
    assert not any(unit.is_absent for unit in rig.units)
    start(rig, rig.units[0])
    assert rig.orders().workers == ((LLM_1, 1),)
    assert rig.nodes.states()[1].public_key == b"k"
    ready = WorkerReady(sender=LLM_1, epoch=1)
    report = WorkerReport(LLM_1, 1, URLS)
    assert rig.report(report) == []
    assert rig.units[0].states()[0].urls == URLS
    assert rig.report(msgspec.structs.replace(report, ready=ready), number=2) == [ready]
    assert rig.report(msgspec.structs.replace(report, ready=ready), number=3) == [], "told once"
    assert rig.orders().heard == 3
    stats = WorkerStats(sender=LLM_1, epoch=1, phase="serving")
    passed_on = StatusPassedOn(node_id=b"a" * 16, status=stats)
    assert rig.hear(passed_on) == [stats]
    assert rig.hear(msgspec.structs.replace(passed_on, node_id=b"b" * 16)) == [], "no such node"


def test_a_node_with_vits_only_starts_no_group() -> None:
    rig = Rig()
    rig.hear(join(is_vit_only=True))
    assert [unit.is_absent for unit in rig.units] == [True, False]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"node_rank": 2}, "node_rank 2 is none of this pipeline's: nnodes is 2 at the head"),
        ({"node_rank": 0}, "node_rank 0 is none"),
        ({"version": "2"}, "node 1 has version 2, the head 1"),
        ({"checkpoint": "d"}, "another checkpoint"),
        ({"options": {"tp": "2"}}, "tp is 2 there and 1 at the head"),
        ({"options": {}}, "tp is unknown there"),
    ],
)
def test_who_is_refused(changes: dict[str, Any], sentence: str) -> None:
    rig = Rig()
    rig.hear(join(**changes))
    (refusal,) = rig.publisher.take(JoinRefused)
    assert sentence in refusal.reason
    assert all(unit.is_absent for unit in rig.units)


def test_new_weights_are_expected_of_nodes_that_join_later() -> None:
    rig = Rig()
    rig.nodes.expect("d")
    rig.hear(join())
    assert len(rig.publisher.take(JoinRefused)) == 1
    rig.hear(join(b"b" * 16, checkpoint="d"))
    assert len(rig.nodes.states()) == 2


def test_a_dead_worker_is_reported_with_what_it_executed(rig: Rig) -> None:
    unit = rig.units[0]
    start(rig, unit)
    told = rig.report(WorkerReport(LLM_1, 1, URLS, -9, (b"x",), True, None, "because"))
    assert told == [WorkerFailed(sender=LLM_1, epoch=1, error="because")]
    assert unit.has_dead_member
    assert (executed_by(unit), has_worked(unit)) == ((b"x",), True)
    assert rig.orders().workers == ()


def test_a_killed_worker_is_not_ordered_any_more_and_dead_only_when_reported(rig: Rig) -> None:
    start(rig, rig.units[0])
    child = rig.units[0].children[LLM_1]
    child.process.kill()
    assert rig.orders().workers == ((LLM_1, 1),), (
        "the node may not know it yet, and would never report its end"
    )
    rig.report(WorkerReport(LLM_1, 1, URLS))
    assert rig.orders().workers == ()
    assert child.process.exit_code is None
    rig.report(WorkerReport(LLM_1, 2, URLS, -9))
    assert child.process.exit_code is None, "of another incarnation"
    rig.report(WorkerReport(LLM_1, 1, URLS, -9))
    assert child.process.exit_code == -9


def test_a_silent_node_is_lost_after_it_has_fenced_itself(rig: Rig) -> None:
    start(rig, rig.units[0])
    rig.report(now=5.0)
    rig.nodes.lose_silent(19.9)
    assert rig.units[0].children[LLM_1].process.exit_code is None
    rig.hear(join(b"b" * 16), now=19.9)
    assert rig.nodes.states()[1].public_key == b"k", "its predecessor may still live"
    rig.nodes.lose_silent(20.1)
    assert rig.units[0].children[LLM_1].process.exit_code == -9
    assert rig.units[0].is_absent
    assert rig.report(now=21.0) == [], "what it says is not heard any more"
    rig.hear(join(b"b" * 16, public_key=b"new"), now=22.0)
    assert rig.nodes.states()[1].public_key == b"new"


def test_a_node_that_is_done_frees_its_place_at_once(rig: Rig) -> None:
    start(rig, rig.units[0])
    rig.report(is_done=True)
    assert rig.units[0].children[LLM_1].process.exit_code == -9
    assert len(rig.nodes.states()) == 1


def test_a_node_leaves_once_its_group_is_idle(rig: Rig) -> None:
    start(rig, rig.units[0])
    rig.report(is_leaving=True, now=5.0)
    assert rig.units[0].is_closed
    idle: Any = SimpleNamespace(is_idle_at=lambda node, since: (node, since) == (1, 5.0) and now > 6)
    now = 6.0
    rig.nodes.release_idle(idle)
    assert not rig.orders().may_leave
    now = 7.0
    rig.nodes.release_idle(idle)
    assert rig.orders().may_leave


def test_a_node_whose_worker_cannot_start_is_sent_away(rig: Rig) -> None:
    start(rig, rig.units[0])
    rig.nodes.expel(1, "no such file", 0.0)
    (refusal,) = rig.publisher.take(JoinRefused)
    assert refusal.reason == "no such file"
    assert rig.units[0].is_absent
    assert rig.units[0].phase is Phase.STARTING, "the supervisor sees the death"
    assert rig.units[0].has_dead_member


# The node's side.


class NodeRig:
    def __init__(self) -> None:
        self.now = 100.0
        sink = FakeSink()
        sink.try_send = sink.send  # type: ignore[attr-defined]
        self.sink: Any = sink
        self.inbox: list[Any] = []
        orders: Any = SimpleNamespace(
            receive=lambda: SimpleNamespace(message=self.inbox.pop(0)) if self.inbox else None
        )
        self.membership = Membership(join(), 10.0, self.sink, orders, lambda: self.now)

    def hear(self, *messages: Any) -> NodeOrders | None:
        self.inbox += messages
        return self.membership.read_orders()


def orders(heard: int = 0, **flags: bool) -> NodeOrders:
    return NodeOrders(heard=heard, workers=(), state=STATE, **flags)


def test_the_time_runs_from_the_last_report_that_was_acknowledged() -> None:
    rig = NodeRig()
    rig.membership.join()
    assert not rig.membership.is_taken_in
    rig.hear(orders())
    assert (rig.membership.is_taken_in, rig.membership.fenced_at) == (True, 110.0)
    for now in (101.0, 102.0, 103.0):
        rig.now = now
        rig.membership.report(())
    rig.now = 108.0
    rig.hear(orders(), orders(heard=2))
    assert rig.membership.fenced_at == 112.0, "sent at 102, however late the answer comes"
    rig.hear(orders(heard=1))
    assert rig.membership.fenced_at == 112.0, "an answer that was overtaken"
    assert not rig.membership.may_leave
    rig.hear(orders(heard=3, may_leave=True))
    assert (rig.membership.fenced_at, rig.membership.may_leave) == (113.0, True)


def test_a_refusal_ends_the_node() -> None:
    with pytest.raises(NodeEnded, match="the head refuses this node: because"):
        NodeRig().hear(JoinRefused(reason="because"))


# What belongs where.


def config(**cluster: Any) -> Config:
    options = {"nnodes": 2, "master_addr": "h", "node_token_file": "f", **cluster}
    return Config(cluster=ClusterConfig(**options), llm=LlmConfig(tp=2), vit=VitConfig(vit=3))


def test_places_of_workers() -> None:
    made = config()
    assert (made.num_vits, made.num_ranks, made.leads) == (6, 4, (0, 2))
    spec = node_spec(made)
    assert [spec.node_of(WorkerId(Role.LLM, rank)) for rank in range(4)] == [0, 0, 1, 1]
    assert [spec.node_of(WorkerId(Role.VIT, rank)) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    assert spec.node_of(PREPROCESS) == 0
    assert list(spec.vits_near(2)) == [3, 4, 5]
    assert doors_of(LLM_0, made) == ("llm.0", "outputs.0")
    assert doors_of(WorkerId(Role.LLM, 1), made) == (), "it leads no group"
    assert doors_of(VIT_0, made) == ("encode.0",)
    assert doors_of(VIT_0, Config()) == (), "on a single machine nothing listens"


def test_options_that_differ_are_named() -> None:
    ours = shared_options(config())
    assert difference(1, shared_options(config(node_rank=1, node_address="x")), ours) == ""
    theirs = shared_options(config(node_timeout=5))
    assert difference(1, theirs, ours) == (
        "node 1 was started with other options than the head: node_timeout is 5 there and 10.0 at the head"
    )
