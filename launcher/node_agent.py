"""The launcher of a node other than the head: it joins, runs the workers that the head orders, and reports.

    join → run what is ordered → fence when the head is silent, and join again
                               → leave at a signal, end with the pipeline

The node may run workers for `--node-timeout` after it sent the last report that the head has acknowledged.
Then it kills and reaps them all: the head publishes their deaths only later (see nodes.py).
"""

from __future__ import annotations

import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType

import msgspec

from launcher.checkpoints import Model
from launcher.machines import join_request
from launcher.members import node_spec, workers_on
from launcher.membership import Membership, NodeEnded
from launcher.service_manager import ALIVE, READY, STOPPING, ServiceManager
from launcher.spawner import Spawner
from launcher.units import Child
from launcher.witness import Will, Witness
from pipeline.config import Config
from pipeline.transport.cluster import Far
from pipeline.transport.ends import Publisher, Receiver, Sender
from pipeline.transport.joining import HeadAddress, LaunchersKeys, new_keys, read_token
from pipeline.transport.poller import Poller, Wakeup
from pipeline.transport.sockets import Sockets
from pipeline.wire.control import ControlMessage, PipelineState, StatusMessage, WorkerFailed, WorkerReady
from pipeline.wire.nodes import OrdersMessage, ReportMessage, WorkerReport
from pipeline.wire.topology import CONTROL, ORDERS, REPORTS, STATUS, WorkerId

logger = logging.getLogger(__name__)
JOIN_S = 300.0  # without a head that takes this node in: it may start later, or its link be down
REFUSALS = 3  # of connections in a row, after which the token counts as another one
REAP_S = 4.0  # from SIGKILL to the end of a worker
HEARTBEAT_S, MAX_HEARTBEATS = 1.0, 8  # of reports; so many in the time after which the node is fenced


class NodeAgent:
    def __init__(
        self,
        config: Config,
        model: Model,
        run_dir: Path,
        environment: dict[str, str],
        manager: ServiceManager,
    ) -> None:
        """`environment` is the workers'. Raises ValueError for a bad token."""
        self._config, self._model, self._manager = config, model, manager
        cluster, self._keys = config.cluster, new_keys()
        workers, spec = workers_on(cluster.node_rank, config), node_spec(config, self._keys)
        token = read_token(Path(cluster.node_token_file))
        self._head = HeadAddress(cluster.master_addr, cluster.master_port, LaunchersKeys(token))
        self._will = Will(cluster.master_addr, cluster.master_port, token, node_id=b"")
        self._witness = Witness()
        inherited = [self._witness.pipe]
        self._spawner = Spawner(config, model.folder, run_dir, environment, workers, spec, inherited)
        self._inside = Sockets(run_dir, {})
        self._status: Receiver[StatusMessage] = self._inside.receiver(STATUS)
        self._control: Publisher[ControlMessage] = self._inside.publisher(CONTROL)
        self._wakeup = Wakeup()
        self._num_signals = 0
        self._children: dict[WorkerId, Child] = {}  # living ones, and dead ones until the head orders others
        self._executed: dict[WorkerId, tuple[bytes, ...]] = {}  # of dead ones
        self._state: PipelineState | None = None
        self._leaves_at = math.inf

    def run(self) -> int:
        """Until a signal or the end of the pipeline (0), or a failure (1)."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the head reloads
        reason = ""
        try:
            self._witness.start()
            self._spawner.start()
            while True:
                self._be_member()
        except NodeEnded as end:
            reason = str(end)
        finally:
            if reason:
                logger.error("%s", reason)
            self._manager.tell(STOPPING)
            living = [child for child in self._children.values() if child.process.exit_code is None]
            if (
                self._state is None or self._state.end is None
            ):  # else they have read it, and end by themselves
                for child in living:
                    child.process.kill()
            self._spawner.stop(living)
            self._witness.close()
            self._inside.close()
            self._wakeup.close()
            self._manager.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 1 if reason else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        self._wakeup.set()

    def _be_member(self) -> None:
        """From joining to the head's silence. Raises NodeEnded."""
        sockets = Sockets(self._head, {})
        try:
            request = join_request(self._config, self._model.folder, self._keys.public)
            reports: Sender[ReportMessage] = sockets.sender(REPORTS)
            orders: Receiver[OrdersMessage] = sockets.subscriber(ORDERS, request.node_id)
            membership = Membership(request, self._config.cluster.node_timeout, reports, orders)
            self._witness.instruct(msgspec.structs.replace(self._will, node_id=request.node_id))
            self._join(membership)
            self._serve(membership)
            self._fence()
            membership.report(self._reports(), is_done=True)
            # A head that has started anew counts epochs anew: its orders are not about these.
            self._children.clear()
            self._executed.clear()
            if self._leaves_at < math.inf:
                raise NodeEnded
        finally:
            self._head.stop_watching()
            sockets.close(linger_ms=200)

    # Join.

    def _join(self, membership: Membership) -> None:
        poller = Poller(membership.orders, self._wakeup)
        logger.info("node %d joins the head at %s", self._config.cluster.node_rank, self._head.name)
        end = time.monotonic() + JOIN_S
        while self._state is None or not membership.is_taken_in:
            self._wakeup.clear()
            self._check_signals()
            self._manager.tell(ALIVE)
            membership.join()
            poller.wait(HEARTBEAT_S)
            self._read_orders(membership)
            self._head.read_handshakes()
            if self._head.num_failed_handshakes >= REFUSALS:
                file = self._config.cluster.node_token_file
                raise NodeEnded(
                    f"{self._head.name} does not accept the token in {file}: is it that of the head?"
                )
            if time.monotonic() > end:
                raise NodeEnded(f"no head has answered at {self._head.name} for {JOIN_S:.0f} s")
        logger.info("node %d has joined", self._config.cluster.node_rank)
        self._manager.tell(READY)

    def _check_signals(self) -> None:
        if self._num_signals > int(self._leaves_at < math.inf):
            raise NodeEnded

    # Serve.

    def _serve(self, membership: Membership) -> None:
        """Until the head has been silent for too long."""
        poller = Poller(membership.orders, self._status, self._control, self._wakeup, self._spawner)
        report_due = 0.0
        while (now := time.monotonic()) < membership.fenced_at:
            self._wakeup.clear()
            before = self._state
            # Orders alone are no news: the head answers each report with some.
            has_news = self._read_orders(membership) | self._read_status(membership) | self._watch(now)
            if self._state is not before or any(event.is_new for event in self._control.subscriptions()):
                self._publish_state()
            if self._num_signals and self._leaves_at == math.inf:
                self._leaves_at = now + self._config.launcher.shutdown_timeout
                logger.info("leaving: open requests are finished first (Ctrl-C again: at once)")
                has_news = True
            self._check_signals()
            if membership.may_leave or now > self._leaves_at:
                self._fence()
                membership.report(self._reports(), is_done=True)
                raise NodeEnded
            if has_news or now >= report_due:
                report_due = now + min(HEARTBEAT_S, self._config.cluster.node_timeout / MAX_HEARTBEATS)
                self._manager.tell(ALIVE)
                membership.report(self._reports(), is_leaving=self._leaves_at < math.inf)
            poller.wait(max(0.0, min(report_due, membership.fenced_at) - time.monotonic()))
        timeout_s = self._config.cluster.node_timeout
        logger.error("the head has been silent for %.0f s: all workers of this node are killed", timeout_s)

    def _read_orders(self, membership: Membership) -> bool:
        """Whether workers were started. Raises NodeEnded where the head refuses this node, or ends."""
        if (orders := membership.read_orders()) is None:
            return False
        self._state = orders.state
        if orders.state.end is not None:
            self._publish_state()
            self._witness.instruct(None)
            raise NodeEnded(f"the pipeline has ended: {orders.state.end}" if orders.state.end else "")
        wanted = dict(orders.workers)
        for worker, child in self._children.items():
            if child.process.exit_code is None and wanted.get(worker) != child.epoch:
                child.process.kill()
        num_started = sum(self._run(worker, epoch, orders.state) for worker, epoch in wanted.items())
        return num_started > 0

    def _run(self, worker: WorkerId, epoch: int, state: PipelineState) -> bool:
        """Whether it was started now."""
        before = self._children.get(worker)
        if before is not None and (before.epoch == epoch or before.process.exit_code is None):
            # it runs, or has ended, which the head does not know yet; or its predecessor still lives
            return False
        epochs = {str(one.worker): one.epoch for one in state.workers}
        epochs[str(worker)] = epoch
        self._executed.pop(worker, None)
        self._children[worker] = self._spawner.fork(worker, epochs, state.quarantined, Far.of(state))
        return True

    def _publish_state(self) -> None:
        if self._state is not None:
            for path in self._inside.bind_again():
                logger.warning("%s was removed: bound again", path)
            self._control.publish(self._state)

    def _read_status(self, membership: Membership) -> bool:
        """Passes on what workers say. Whether a worker has become ready, or has failed."""
        has_news = False
        while (received := self._status.receive()) is not None:
            message = received.message
            child = self._children.get(message.sender)
            if child is None or child.epoch != message.epoch:
                continue
            if isinstance(message, WorkerReady):
                child.ready, child.moved_at, has_news = message, time.monotonic(), True
            elif isinstance(message, WorkerFailed):
                child.error, has_news = message.error, True
            else:
                membership.pass_on(message)
        return has_news

    def _watch(self, now: float) -> bool:
        """Kills who hangs. Whether a worker has ended. Raises NodeEnded without the fork server."""
        if not self._spawner.read():
            raise NodeEnded("the fork server has ended, and with it every worker of this node")
        has_news, patience_s = False, self._config.launcher.hang_timeout
        for worker, child in self._children.items():
            if child.process.exit_code is not None:
                if worker not in self._executed:
                    self._executed[worker] = self._spawner.clean_up_worker(worker, child.epoch)
                    has_news = True
            elif child.ready and patience_s and not self._spawner.has_moved(child, now, patience_s):
                logger.error("%s has not moved on for %.0f s: killed", worker, now - child.moved_at)
                child.process.kill()
        return has_news

    def _reports(self) -> tuple[WorkerReport, ...]:
        return tuple(
            WorkerReport(
                worker=worker, epoch=child.epoch, urls=child.urls, exit_code=child.process.exit_code,
                executed=self._executed.get(worker, ()), has_worked=self._spawner.worked(worker),
                ready=child.ready, error=child.error,
            )
            for worker, child in self._children.items()
            if child.process.exit_code is None or worker in self._executed
        )  # fmt: skip

    def _fence(self) -> None:
        """Kills and reaps every worker."""
        for child in self._children.values():
            child.process.kill()
        end = time.monotonic() + REAP_S
        for child in self._children.values():
            if not child.process.wait(max(0.0, end - time.monotonic())):
                raise NodeEnded(f"{child.worker} is killed and does not end: this node ends with it")
        self._watch(time.monotonic())
        self._state = None
