"""The other nodes, as the head knows them: who has joined, what runs there, who is lost.

The node itself kills its workers `--node-timeout` after it sent the last report that the head has
acknowledged, and reaps them. The head counts a node as lost only later (`LOST`), by the node's last report:
so no worker of a lost node lives when its death is published.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from launcher.fleet import Fleet
from launcher.members import difference
from launcher.units import Child, Unit
from pipeline.process.nodes import HEAD
from pipeline.transport.ends import Publisher, Receiver
from pipeline.wire.control import NodeState, PipelineState, StatusMessage, WorkerFailed
from pipeline.wire.nodes import (
    JoinRefused,
    JoinRequest,
    NodeOrders,
    NodeReport,
    OrdersMessage,
    ReportMessage,
    StatusPassedOn,
    WorkerReport,
)
from pipeline.wire.topology import Role, WorkerId

logger = logging.getLogger(__name__)
LOST, LOST_AFTER_S = 1.5, 5.0  # times the node's own limit; and at least so long after it, for reaping
KILLED = -int(signal.SIGKILL)


class FarProcess:
    """A worker's process on another node."""

    pid = None

    def __init__(self, worker: WorkerId, epoch: int) -> None:
        self.worker, self.epoch = worker, epoch
        self.exit_code: int | None = None
        self.is_wanted = True
        self.report: WorkerReport | None = None
        self.urls: dict[str, str] = {}  # the child's, too

    def kill(self) -> None:
        self.is_wanted = False

    def wait(self, timeout_s: float | None = None) -> bool:
        """Never waits: the report comes when it comes."""
        return self.exit_code is not None


@dataclass(slots=True, eq=False)
class Joined:
    """A node between its joining and its end."""

    rank: int
    node_id: bytes
    public_key: bytes
    is_vit_only: bool
    heard_at: float
    heard: int = 0
    is_leaving: bool = False
    leaves_at: float = 0.0
    may_leave: bool = False
    processes: dict[WorkerId, FarProcess] = field(default_factory=dict)


class Nodes:
    def __init__(
        self,
        units: Mapping[int, Sequence[Unit]],
        head_key: bytes,
        expected: JoinRequest,
        reports: Receiver[ReportMessage],
        orders: Publisher[OrdersMessage],
        timeout_s: float,
    ) -> None:
        """`units`: by node. `expected`: a request of which version, checkpoint and options count.
        `timeout_s`: after which a node fences itself."""
        self._units, self._expected, self._head_key = units, expected, head_key
        self.reports, self.orders = reports, orders
        self._lost_after_s = max(LOST * timeout_s, timeout_s + LOST_AFTER_S)
        self._joined: dict[int, Joined] = {}
        self._told: set[bytes] = set()  # nodes whose refusal was logged
        self.has_news = False  # orders are to be sent before the next heartbeat

    def expect(self, checkpoint: str) -> None:
        """Of nodes that join from now on."""
        self._expected = msgspec.structs.replace(self._expected, checkpoint=checkpoint)

    # What nodes say.

    def read(self, now: float) -> list[StatusMessage]:
        """Handles all reports. Returns what workers on the nodes tell their launcher."""
        statuses: list[StatusMessage] = []
        while (received := self.reports.receive()) is not None:
            match message := received.message:
                case JoinRequest():
                    self._on_join(message, now)
                case NodeReport():
                    statuses += self._on_report(message, now)
                case StatusPassedOn():
                    if self._of(message.node_id) is not None:
                        statuses.append(message.status)
        self.orders.subscriptions()
        return statuses

    def _of(self, node_id: bytes) -> Joined | None:
        return next((node for node in self._joined.values() if node.node_id == node_id), None)

    def _on_join(self, request: JoinRequest, now: float) -> None:
        if self._of(request.node_id) is not None:
            self.has_news = True  # the answer was lost
            return
        if reason := self._refusal(request):
            self.orders.publish(JoinRefused(reason=reason), request.node_id)
            if request.node_id not in self._told:
                self._told.add(request.node_id)
                logger.warning("a node was refused: %s", reason)
            return
        if request.node_rank in self._joined:
            return  # its predecessor is not known to be dead yet: the node asks again
        node = Joined(
            request.node_rank, request.node_id, request.public_key, request.is_vit_only, heard_at=now
        )
        self._joined[node.rank] = node
        for unit in self._units[node.rank]:
            unit.is_absent, unit.is_closed = not all(self._can_run(unit, rank) for rank in unit.nodes), False
        self.has_news = True
        logger.info("node %d has joined", node.rank)

    def _can_run(self, unit: Unit, rank: int) -> bool:
        """A part of the unit, on this node."""
        node = self._joined.get(rank)
        return rank == HEAD or (node is not None and not (unit.role is Role.LLM and node.is_vit_only))

    def _refusal(self, request: JoinRequest) -> str:
        expected, rank = self._expected, request.node_rank
        if not HEAD < rank < 1 + max(self._units, default=HEAD):
            return (
                f"node_rank {rank} is none of this pipeline's: nnodes is {1 + max(self._units)} at the head"
            )
        if request.version != expected.version:
            return f"node {rank} has version {request.version}, the head {expected.version}"
        if request.checkpoint != expected.checkpoint:
            return f"node {rank} has another checkpoint in its model's folder than the head"
        return difference(rank, request.options, expected.options)

    def _on_report(self, report: NodeReport, now: float) -> list[StatusMessage]:
        if (node := self._of(report.node_id)) is None:
            return []  # it was lost: it hears nothing, and joins again
        node.heard, node.heard_at = report.number, now
        self.has_news = True  # the node's time runs until the report is acknowledged
        if report.is_leaving and not node.is_leaving:
            logger.info("node %d wants to leave: its open requests are finished", node.rank)
            node.is_leaving, node.leaves_at = True, now
            for unit in self._units[node.rank]:
                unit.is_closed = True
        statuses: list[StatusMessage] = []
        for told in report.workers:
            statuses += self._on_worker(node, told)
        if report.is_done:
            self._end(node, "has ended", now)
        return statuses

    def _on_worker(self, node: Joined, told: WorkerReport) -> list[StatusMessage]:
        process = node.processes.get(told.worker)
        if process is None or process.epoch != told.epoch:
            return []
        before, process.report = process.report, told
        if before is None:
            process.urls.update(told.urls)
            self.has_news = True
        found: list[StatusMessage] = []
        origin = {"sender": told.worker, "epoch": told.epoch}
        if told.ready is not None and (before is None or before.ready is None):
            found.append(told.ready)
        if told.error and (before is None or not before.error):
            found.append(WorkerFailed(error=told.error, **origin))  # type: ignore[arg-type]
        if told.exit_code is not None and process.exit_code is None:
            process.exit_code, self.has_news = told.exit_code, True
        return found

    # What the head does with nodes.

    def lose_silent(self, now: float) -> None:
        for node in list(self._joined.values()):
            if now - node.heard_at > self._lost_after_s:
                self._end(node, f"is lost: it has been silent for {now - node.heard_at:.0f} s", now)

    def _end(self, node: Joined, how: str, now: float) -> None:
        """Its workers are dead. Where it wanted to leave, that is no fault."""
        logger.log(logging.INFO if node.is_leaving else logging.ERROR, "node %d %s", node.rank, how)
        del self._joined[node.rank]
        self.has_news = True
        for process in node.processes.values():
            if process.exit_code is None:
                process.exit_code = KILLED
        for unit in self._units[node.rank]:
            unit.is_absent = True
            if node.is_leaving and unit.is_alive:
                unit.on_end(now)

    def release_idle(self, fleet: Fleet) -> None:
        """Lets nodes go that want to leave and have no open requests."""
        for node in self._joined.values():
            if node.is_leaving and not node.may_leave and fleet.is_idle_at(node.rank, node.leaves_at):
                node.may_leave, self.has_news = True, True

    def expel(self, rank: int, reason: str, now: float) -> None:
        """A node whose workers cannot start: the pipeline goes on without it."""
        if (node := self._joined.get(rank)) is None:
            return
        self.orders.publish(JoinRefused(reason=reason), node.node_id)
        self._end(node, f"is sent away: {reason}", now)

    def fork(self, rank: int, worker: WorkerId, epoch: int) -> Child:
        process = self._joined[rank].processes[worker] = FarProcess(worker, epoch)
        self.has_news = True
        return Child(worker, epoch, process, process.urls)

    def states(self) -> tuple[NodeState, ...]:
        """With the head, whose key the others have to know."""
        return (
            NodeState(HEAD, self._head_key),
            *(NodeState(node.rank, node.public_key) for node in self._joined.values()),
        )

    def publish(self, state: PipelineState) -> None:
        """To each node its orders."""
        self.has_news = False
        for node in self._joined.values():
            # One that is not reported may not have been started: without its order no end of it would come.
            wanted = [
                one
                for one in node.processes.values()
                if (one.is_wanted or one.report is None) and one.exit_code is None
            ]
            self.orders.publish(
                NodeOrders(
                    heard=node.heard,
                    workers=tuple((one.worker, one.epoch) for one in wanted),
                    state=state,
                    may_leave=node.may_leave,
                ),
                node.node_id,
            )


def _reports_of(unit: Unit) -> list[WorkerReport]:
    processes = [child.process for child in unit.children.values()]
    return [one.report for one in processes if isinstance(one, FarProcess) and one.report]


def executed_by(unit: Unit) -> tuple[bytes, ...]:
    """Digests of the requests that a dead unit of another node executed, as far as the node could say."""
    return tuple(sorted({digest for report in _reports_of(unit) for digest in report.executed}))


def has_worked(unit: Unit) -> bool:
    return any(report.has_worked for report in _reports_of(unit))
