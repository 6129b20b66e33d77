"""Starts the workers, watches them, replaces those that die, ends them: one poller over their ends, their
words and the signals.

    start all → wait until all are READY → serve until a signal → drain → shut down → reap

A death is published, and a successor started, only when the dead one is reaped, and with it the others of its
unit: a process that only stands still keeps its sockets and would swallow messages. A worker that ends by
itself at its first start, or again and again before it has done anything, ends the pipeline; one that has
served is started again, however often that fails.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import assert_never

from launcher.announcement import announce
from launcher.checkpoints import Model
from launcher.cores import usable_cores
from launcher.listening import listen
from launcher.placement import place, workers
from launcher.progress import ProgressBar
from launcher.quarantine import Quarantine
from launcher.reload import Reload
from launcher.units import Child, Phase, Unit, has_moved, units
from pipeline.config import Config
from pipeline.process.core_sharing import IDLE, Activity
from pipeline.process.flight_recorder import FlightRecorder
from pipeline.process.fork_server import ForkServer
from pipeline.process.process import WAITING, WorkerSpec
from pipeline.transport.ends import Publisher, Receiver
from pipeline.transport.poller import Poller, Wakeup
from pipeline.transport.sockets import Sockets
from pipeline.wire.errors import PipelineError
from pipeline.wire.messages import (
    ControlMessage,
    Drain,
    FirstTokenYielded,
    PipelineState,
    PoolClosed,
    ReloadRequested,
    Retire,
    Shutdown,
    StatusMessage,
    WorkerFailed,
    WorkerReady,
    WorkerStats,
)
from pipeline.wire.topology import CONTROL, EDGES, STATUS, Role, WorkerId, socket_name

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
START_TIMEOUT_S = 600.0  # without a word from what is to start
STOP_TIMEOUT_S = 5.0  # from Shutdown to SIGKILL
OTHERS_END_S = 0.5  # for a rank to end because of another, while both start
UNRECORDED = (Role.API, Role.GATEWAY)
MAPPERS = {Role.VIT: Role.LLM, Role.PREPROCESS: Role.VIT}  # whose memory is mapped by whom


class CannotStart(Exception):
    """A worker does not get as far as serving, or nobody is left to start one."""


class _Stopped(Exception):
    """A signal asks for the end."""


class Supervisor:
    def __init__(self, config: Config, model: Model, run_dir: Path, environment: dict[str, str]) -> None:
        """`environment` is the workers'."""
        self._config, self._model, self._run_dir = config, model, run_dir
        self._listening: list[socket.socket] = []
        self._units = units(workers(config.num_vits, config.num_ranks, config.has_gateway), config.llm.tp)
        self._unit_of = {worker: unit for unit in self._units for worker in unit.members}
        self._placement = place(
            usable_cores(list(os.sched_getaffinity(0))), config.num_vits, config.num_ranks,
            config.llm.llm_cores, config.vit.vit_cores,
            is_elastic=config.launcher.cpu_sharing == "elastic",
        )  # fmt: skip
        self._sockets = Sockets(run_dir, {})
        self._status: Receiver[StatusMessage] = self._sockets.receiver(STATUS)
        self._control: Publisher[ControlMessage] = self._sockets.publisher(CONTROL)
        self._wakeup = Wakeup()
        self._fork_server = ForkServer(environment)
        self._poller = Poller(self._status, self._control, self._wakeup, self._fork_server)
        self._recorders = {worker: FlightRecorder(run_dir, worker) for worker in self._unit_of}
        self._activity = Activity(run_dir)
        self._quarantine = Quarantine()
        self._reload = Reload(model.folder)
        self._retired: list[Child] = []  # endpoints whose successors serve already
        self._num_signals = self._num_hangups = 0
        self._is_draining = False
        self._heartbeat_due = 0.0
        self._progress = ProgressBar()

    def run(self) -> int:
        """Serves until a signal (0) or a failure (1). Raises OSError where it cannot listen."""
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        reason = ""
        try:
            self._listening = listen(self._config.api.host, self._config.api.port)
            self._fork_server.start()
            if self._model.notice:
                logger.info("%s", self._model.notice)
            self._wait_until(lambda: all(unit.is_serving for unit in self._units))
            self._progress.close()
            announce(self._config, self._model, self._run_dir, self._listening[0].getsockname()[1])
            self._wait_until(lambda: False)
        except _Stopped:
            reason = self._drain()
        except CannotStart as failure:
            reason = str(failure)
        finally:
            self._progress.close()
            if reason:
                logger.error("%s", reason)
            self._stop(reason)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 1 if reason else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._num_hangups += 1
        else:
            self._num_signals += 1
        self._wakeup.set()

    # Start.

    def _start_unit(self, unit: Unit) -> None:
        self._bind_again()  # what starts connects to us
        epochs = {str(worker): other.epoch for other in self._units for worker in other.members}
        quarantined = self._quarantine.quarantined(time.monotonic())
        children: list[Child] = []
        for worker in unit.members:
            self._renew_recorder(worker)
            spec = WorkerSpec(
                worker=worker, epochs=epochs, run_dir=str(self._run_dir),
                model_folder=str(self._model.folder),
                placement=self._placement[worker], config=self._config, quarantined=quarantined,
            )  # fmt: skip
            fds = [listening.fileno() for listening in self._listening] if worker.role is Role.API else []
            children.append(Child(worker, unit.epoch, self._fork_server.fork(spec, fds)))
        unit.begin(children, time.monotonic())

    def _renew_recorder(self, worker: WorkerId) -> None:
        """Empty, for a new incarnation; made anew where somebody has removed the file."""
        if not self._recorders[worker].path.exists():
            self._recorders[worker].close()
            self._recorders[worker] = FlightRecorder(self._run_dir, worker)
        self._recorders[worker].clear()

    def _is_started(self) -> bool:
        return all(unit.has_served for unit in self._units)

    # Watch.

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        """Handles what happens until `is_done`.

        Raises CannotStart, and _Stopped at the first signal (outside of a drain).
        """
        while True:
            self._wakeup.clear()
            self._read_status()
            if self._num_signals > int(self._is_draining):
                raise _Stopped
            self._watch_units()
            self._watch_reload()
            has_new = any(event.is_new for event in self._control.subscriptions())
            if has_new or time.monotonic() >= self._heartbeat_due:
                self._bind_again()
                self._publish_state()
                self._kill_the_hung()
            if is_done():
                return
            wake_at = min(self._heartbeat_due, *(unit.wakes_at() for unit in self._units))
            self._poller.wait(max(0.0, wake_at - time.monotonic()))

    def _bind_again(self) -> None:
        """Else no successor of a worker would ever reach us.

        Raises CannotStart where the run directory itself is gone.
        """
        try:
            for path in self._sockets.bind_again():
                logger.warning("%s was removed: bound again", path)
        except PipelineError as error:
            raise CannotStart(f"the run directory is gone: {error}") from None

    def _publish_state(self) -> None:
        now = time.monotonic()
        self._heartbeat_due = now + HEARTBEAT_S
        for report in filter(None, (unit.report(now) for unit in self._units)):
            logger.info("%s", report)
        states = tuple(state for unit in self._units for state in unit.states(now))
        if not self._control.publish(
            PipelineState(
                workers=states,
                leads=self._config.leads,
                is_draining=self._is_draining,
                reload=self._reload.state,
                quarantined=self._quarantine.quarantined(now),
            )
        ):
            logger.debug("a subscriber of the control edge lags behind")

    def _read_status(self) -> None:
        while (received := self._status.receive()) is not None:
            message = received.message
            unit = self._unit_of.get(message.sender)
            child = unit.children.get(message.sender) if unit is not None else None
            if unit is None or child is None or message.epoch != child.epoch:
                continue  # the last words of a dead one
            unit.news_at = now = time.monotonic()
            match message:
                case WorkerReady():
                    child.ready, child.moved_at = message, now
                    logger.debug("%s is ready %s", child.worker, message.details)
                    self._on_ready(unit, message)
                case WorkerStats():
                    child.stats, child.stats_time = message, now
                    if child.ready is None and not unit.has_served and not message.phase.startswith(WAITING):
                        self._progress.show(str(child.worker), message.phase, message.done, message.total)
                case ReloadRequested():
                    self._num_hangups += 1
                case FirstTokenYielded(digest=digest):
                    self._quarantine.clear(digest)
                case WorkerFailed():
                    child.error, child.error_time = message.error, now
                case PoolClosed():
                    for dead in self._units:
                        if message.pool_id == str(dead.members[0]) and message.pool_epoch == dead.epoch - 1:
                            dead.unmapping.discard(message.sender)
                case _:
                    assert_never(message)

    def _on_ready(self, unit: Unit, message: WorkerReady) -> None:
        if holds_weights(unit) and self._reload.has_new_weights():  # since it started: which has it loaded?
            self._replace_weights()
            return
        was_restarted = unit.has_served
        unit.on_ready(time.monotonic())
        if self._retired and message.sender.role is Role.API:
            for child in self._retired:
                self._control.publish(Retire(worker=child.worker, epoch=child.epoch))
        elif unit.is_serving and was_restarted:
            logger.info("%s serves again, %.1f s after it died", unit.name, time.monotonic() - unit.died_at)
        self._heartbeat_due = 0.0

    def _watch_units(self) -> None:
        """One look at every unit: has it died, is it reaped, is its successor due?"""
        self._fork_server.read()
        if self._fork_server.is_dead:
            raise CannotStart("the fork server has ended, and with it every worker")
        now = time.monotonic()
        for unit in self._units:
            if unit.phase in (Phase.STARTING, Phase.SERVING) and any(
                child.process.exit_code is not None for child in unit.children.values()
            ):
                self._on_death(unit, now)
            if unit.is_reaped:
                self._on_reaped(unit, now)
            if unit.phase is Phase.DOWN and now >= unit.wakes_at():
                if unit.unmapping:
                    logger.warning(
                        "%s still has memory of %s", ", ".join(map(str, sorted(unit.unmapping))), unit.name
                    )
                if holds_weights(unit) and self._reload.has_new_weights():
                    self._replace_weights()
                self._start_unit(unit)
            if unit.is_late(now, START_TIMEOUT_S):
                late = ", ".join(str(worker) for worker, child in unit.children.items() if not child.ready)
                reason = f"{late} did not become ready: no progress for {START_TIMEOUT_S:.0f} s"
                if not unit.has_served:
                    raise CannotStart(reason)
                logger.error("%s: killed", reason)
                for child in unit.children.values():
                    child.process.kill()

    def _watch_reload(self) -> None:
        """Goes on with a reload, if one was asked for: whose turn it is dies, and its requests come again."""
        if self._num_hangups:
            self._num_hangups = 0
            is_possible = self._is_started() and not self._is_draining
            self._reload.begin(self._units, is_possible, time.monotonic())
            self._heartbeat_due = 0.0
        self._retired = [child for child in self._retired if child.process.exit_code is None]
        if self._is_draining:
            return
        if self._reload.waits_since is not None:
            self._close_groups(self._reload.waits_since)
        if (unit := self._reload.next(self._units)) is None:
            return
        if unit.members[0].role is Role.API:  # its connections would die with it: its successor comes first
            self._retired += unit.children.values()
            unit.epoch += 1
            self._start_unit(unit)
            return
        unit.on_end(time.monotonic())

    def _close_groups(self, since: float) -> None:
        """Clients keep new requests for themselves until the weights are replaced: when none is open, or open
        ones have had their time."""
        for unit in self._units:
            unit.is_closed = unit.members[0].role is Role.LLM
        if self._is_idle(since) or time.monotonic() - since > self._config.launcher.shutdown_timeout:
            self._replace_weights()

    def _replace_weights(self) -> None:
        """All at once: no request may meet workers of two generations.

        Clients give up a request that has tokens of the last one.
        """
        logger.info("the weights in %s are new: ViTs and LLMs are replaced", self._model.folder)
        self._reload.take_new_weights()
        now = self._heartbeat_due = time.monotonic()
        for unit in self._units:
            unit.is_closed = False
            if holds_weights(unit) and unit.phase in (Phase.STARTING, Phase.SERVING):
                unit.on_end(now)

    def _is_idle(self, since: float, *others: WorkerId) -> bool:
        """Whether preprocess, all groups and `others` have told, after `since`, that no request is open."""
        groups = (WorkerId(Role.LLM, lead) for lead in self._config.leads)
        tell = [WorkerId(Role.PREPROCESS), *groups, *others]
        children = [self._unit_of[worker].children.get(worker) for worker in tell]
        return all(
            child and child.stats and child.stats_time > since and not child.stats.num_open_requests
            for child in children
        )

    def _on_death(self, unit: Unit, now: float) -> None:
        """One of the unit has ended: its others are killed.

        Raises CannotStart where a successor would fare no better.
        """
        self._read_status()  # last words
        self._bind_again()  # first: it may have ended because the run directory is gone
        if unit.phase is Phase.STARTING:
            for child in unit.children.values():  # one rank may see the end of another before we do
                child.process.wait(OTHERS_END_S)
        dead = [
            (child.process.exit_code, child)
            for child in unit.children.values()
            if child.process.exit_code is not None
        ]
        # One that was killed comes first, then who told its error first: others may have ended because of it,
        # as ranks do.
        code, first = min(dead, key=lambda end: (end[0] >= 0, end[1].error_time))
        reason = f"{first.worker} {_describe_exit(code)}{': ' if first.error else ''}{first.error}"
        # The endpoint and the gateway execute no requests: to be ready is all that they prove.
        has_worked = any(
            self._recorders[worker].has_worked or worker.role in UNRECORDED for worker in unit.members
        )  # fmt: skip
        if unit.on_death(now, code, has_worked):
            if (num_failed := unit.num_failed_starts) > 1:
                reason += f" ({num_failed} starts in a row have failed)"
            raise CannotStart(reason)
        logger.error("%s: it is replaced", reason)
        for child in unit.children.values():
            child.process.kill()

    def _on_reaped(self, unit: Unit, now: float) -> None:
        executed: set[bytes] = set()
        for worker in unit.members:
            executed.update(self._recorders[worker].executing())
            if worker.role in (Role.LLM, Role.VIT):
                self._activity.announce(worker, IDLE)
            for edge in EDGES:
                if edge.binder is worker.role:
                    (self._run_dir / socket_name(edge, worker.rank, unit.epoch)).unlink(missing_ok=True)
        mappers = {
            child.worker for other in self._units if other.is_serving
            for child in other.children.values() if child.worker.role is MAPPERS.get(unit.members[0].role)
        }  # fmt: skip
        unit.on_reaped(now, tuple(sorted(executed)), mappers)
        # Before the death is published: one message says both, and nobody resubmits on half of it.
        self._quarantine.add(unit.members[0].role, unit.executed, now)
        for other in self._units:
            # the dead map nothing, and their successors never did
            other.unmapping.difference_update(unit.members)
        self._publish_state()

    def _kill_the_hung(self) -> None:
        if not (patience_s := self._config.launcher.hang_timeout):
            return
        now = time.monotonic()
        for child in [child for unit in self._units if unit.is_serving for child in unit.children.values()]:
            if not has_moved(child, self._recorders[child.worker], now, patience_s):
                logger.error("%s has not moved on for %.0f s: killed", child.worker, now - child.moved_at)
                child.process.kill()

    # End.

    def _drain(self) -> str:
        """Lets open requests finish; returns why that failed, if it did."""
        logger.info(
            "shutting down: waiting up to %.0f s for open requests (Ctrl-C again: at once)",
            self._config.launcher.shutdown_timeout,
        )
        start = time.monotonic()
        end = start + self._config.launcher.shutdown_timeout
        self._is_draining = True
        self._control.publish(Drain(timeout_s=self._config.launcher.shutdown_timeout))

        def is_idle() -> bool:
            if time.monotonic() >= end or not self._is_started():
                return True
            return self._is_idle(start, WorkerId(Role.API))

        try:
            self._wait_until(is_idle)
        except _Stopped:
            logger.info("stopping at once")
        except CannotStart as failure:
            return str(failure)
        return ""

    def _stop(self, reason: str) -> None:
        """Ends and reaps every worker.

        One that is still starting holds nothing yet, and may not listen yet: it is killed.
        """
        self._control.publish(Shutdown(reason=reason))
        end = time.monotonic() + STOP_TIMEOUT_S
        children = [*self._retired, *(child for unit in self._units for child in unit.children.values())]
        for child in children:
            if child.ready is None:
                child.process.kill()
        for child in children:
            if not child.process.wait(max(0.0, end - time.monotonic())):
                logger.warning("%s does not stop: killed", child.worker)
                child.process.kill()
                child.process.wait(STOP_TIMEOUT_S)
        self._fork_server.close()
        self._sockets.close()
        for listening in self._listening:
            listening.close()
        self._wakeup.close()


def holds_weights(unit: Unit) -> bool:
    return unit.members[0].role in (Role.VIT, Role.LLM)


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
