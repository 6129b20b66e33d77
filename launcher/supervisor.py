"""Starts the workers, watches them, replaces those that die, ends them: one loop over their exits, their
status messages and the signals.

    start all → wait until all are READY → serve until a signal → drain → shut down → reap

A death is published, and a successor started, only when the whole unit is reaped: a process that hangs keeps
its sockets and would swallow messages. What this decides about units is in `fleet.py` and `units.py`, which
processes it starts and how in `spawner.py`.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import assert_never

from launcher.announcement import announce
from launcher.audience import Audience
from launcher.checkpoints import Model
from launcher.fleet import Fleet
from launcher.listening import listen
from launcher.machines import Machines
from launcher.members import all_workers, node_spec
from launcher.progress import StartProgress
from launcher.quarantine import QuarantineRecord
from launcher.reload import Reload
from launcher.service_manager import ALIVE, READY, STOPPING, ServiceManager
from launcher.units import Child, Phase, Unit, units
from pipeline.adapters import named_folders
from pipeline.config import Config
from pipeline.transport.ends import Publisher, Receiver
from pipeline.transport.poller import Poller, Wakeup
from pipeline.transport.sockets import Sockets
from pipeline.wire.base import PoolClosed
from pipeline.wire.control import (
    ControlMessage,
    FirstTokenYielded,
    KillRequested,
    LanesWatched,
    PipelineState,
    ReloadRequested,
    StatusMessage,
    WorkerFailed,
    WorkerReady,
    WorkerStats,
)
from pipeline.wire.errors import PipelineError
from pipeline.wire.topology import CONTROL, STATUS, Role, WorkerId

logger = logging.getLogger(__name__)
HEARTBEAT_S = 1.0
START_TIMEOUT_S = 600.0  # without a message from a unit that starts
DOCTOR = "python -m launcher.doctor says what this machine can do, and what is missing"
OTHERS_END_S = 0.5  # for the ranks that end because of another rank, while a group starts


class CannotStart(Exception):
    """A worker never becomes ready, or the fork server or the run directory is gone."""


class _Stopped(Exception):
    """A signal asks for the end."""


class Supervisor:
    def __init__(
        self,
        config: Config,
        model: Model,
        run_dir: Path,
        environment: dict[str, str],
        manager: ServiceManager,
    ) -> None:
        """`environment` is the workers'."""
        self._config, self._model, self._run_dir, self._manager = config, model, run_dir, manager
        self._listening: list[socket.socket] = []
        node_of = node_spec(config).node_of
        self._fleet = Fleet(units(all_workers(config), config.llm.tp, node_of), config.leads)
        self._sockets = Sockets(run_dir, {})
        self._status: Receiver[StatusMessage] = self._sockets.receiver(STATUS)
        self._control: Publisher[ControlMessage] = self._sockets.publisher(CONTROL)
        self._wakeup = Wakeup()
        self._machines = Machines(config, model.folder, run_dir, environment, self._fleet)
        self._poller = Poller(self._status, self._control, self._wakeup, *self._machines.sources)
        self._quarantine = QuarantineRecord()
        self._reload = Reload(model.folder, tuple(named_folders(config.model.lora).values()))
        self._audience = Audience()
        self._retired: list[Child] = []  # endpoints that finish their connections beside a successor
        self._num_signals = self._num_hangups = 0
        self._is_draining = False
        self._heartbeat_due = 0.0
        self._progress = StartProgress()

    def run(self) -> int:
        """Serves until a signal (0) or a failure (1). Raises OSError where it cannot listen."""
        previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        reason = ""
        try:
            self._listening = listen(self._config.api.host, self._config.api.port)
            self._machines.start()
            if self._model.notice:
                logger.info("%s", self._model.notice)
            self._wait_until(lambda: self._fleet.is_serving)
            self._progress.close()
            announce(self._config, self._model, self._run_dir, self._listening[0].getsockname()[1])
            self._manager.tell(READY)
            self._wait_until(lambda: False)
        except _Stopped:
            reason = self._drain()
        except CannotStart as failure:
            reason = str(failure)
        finally:
            self._progress.close()
            if reason:
                logger.error("%s", reason)
                if not self._fleet.is_started:
                    logger.error("%s", DOCTOR)
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
        self._bind_again()  # the new worker connects to these sockets
        now = time.monotonic()
        quarantined = self._quarantine.quarantined(now)
        unit.begin(self._machines.fork(unit, quarantined, self._listening), now)

    # Watch.

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        """The loop, until `is_done`. Raises CannotStart, and _Stopped at a signal (in a drain, the
        second)."""
        while True:
            self._wakeup.clear()
            self._read_status()
            if self._num_signals > int(self._is_draining):
                raise _Stopped
            self._watch_units()
            self._watch_reload()
            has_new = any(event.is_new for event in self._control.subscriptions())
            if has_new or self._machines.has_news or time.monotonic() >= self._heartbeat_due:
                self._bind_again()
                self._publish_state()
                self._kill_the_hung()
            if is_done():
                return
            wake_at = min(self._heartbeat_due, self._fleet.wakes_at())
            self._poller.wait(max(0.0, wake_at - time.monotonic()))

    def _bind_again(self) -> None:
        """Makes removed socket files anew: a new worker could not connect without them.

        Raises CannotStart where the run directory itself is gone.
        """
        try:
            for path in self._sockets.bind_again():
                logger.warning("%s was removed: bound again", path)
        except PipelineError as error:
            raise CannotStart(f"the run directory is gone: {error}") from None

    def _publish_state(self, end: str | None = None) -> None:
        now = time.monotonic()
        self._heartbeat_due = now + HEARTBEAT_S
        self._manager.tell(ALIVE)
        for report in self._fleet.reports(now):
            logger.info("%s", report)
        state = PipelineState(
            workers=self._fleet.states(now),
            leads=self._config.leads,
            is_draining=self._is_draining,
            retiring=tuple(
                (child.worker, child.epoch)
                for child in self._retired
                if self._fleet.unit_of(child.worker).is_serving
            ),
            end=end,
            reload=self._reload.state,
            quarantined=self._quarantine.quarantined(now),
            nodes=self._machines.states(),
            is_watched=self._audience.is_there(now),
        )
        if not self._control.publish(state):
            logger.debug("a subscriber of the control edge lags behind")
        self._machines.publish(state)

    def _read_status(self) -> None:
        while (received := self._status.receive()) is not None:
            self._on_status(received.message)
        for message in self._machines.hear(time.monotonic()):
            self._on_status(message)

    def _on_status(self, message: StatusMessage) -> None:
        if (sender := self._fleet.sender_of(message)) is None:
            return
        unit, child = sender
        unit.news_at = now = time.monotonic()
        match message:
            case WorkerReady():
                child.ready, child.moved_at = message, now
                logger.debug("%s is ready %s", child.worker, message.details)
                self._progress.on_ready(str(child.worker))
                self._on_ready(unit, message)
            case WorkerStats():
                child.stats, child.stats_time = message, now
                if child.ready is None and not unit.has_served:
                    self._progress.show(str(child.worker), message.phase, message.done, message.total)
            case ReloadRequested():
                self._num_hangups += 1
            case KillRequested(worker=worker):
                self._kill(worker)
            case LanesWatched(seconds=seconds):
                if self._audience.hear(seconds, now):
                    self._heartbeat_due = 0.0
            case FirstTokenYielded(digest=digest):
                self._quarantine.clear(digest)
            case WorkerFailed():
                child.error, child.error_time = message.error, now
            case PoolClosed():
                self._fleet.on_pool_closed(message)
            case _:
                assert_never(message)

    def _kill(self, worker: WorkerId) -> None:
        """What follows is as for any death."""
        if self._fleet.kill(worker):
            logger.warning("%s is killed: an administrator asks for it", worker)
        else:
            logger.warning("%s is not killed, as asked: it does not serve", worker)

    def _on_ready(self, unit: Unit, message: WorkerReady) -> None:
        if (
            unit.holds_weights and self._reload.has_new_weights()
        ):  # it may have loaded the old or the new ones
            self._replace_weights()
            return
        was_restarted = unit.has_served
        unit.on_ready(time.monotonic())
        if unit.is_serving and was_restarted and not (self._retired and unit.role is Role.API):
            logger.info("%s serves again, %.1f s after it died", unit.name, time.monotonic() - unit.died_at)
        self._heartbeat_due = 0.0

    def _watch_units(self) -> None:
        """Checks every unit: has it died, is it reaped, is its successor due, is its start late?"""
        if not self._machines.read():
            raise CannotStart("the fork server has ended, and with it every worker")
        now = time.monotonic()
        for unit in self._fleet.units:
            if unit.has_dead_member:
                self._on_death(unit, now)
            if unit.is_reaped:
                self._on_reaped(unit, now)
            if unit.is_due(now):
                self._on_due(unit)
            if unit.is_late(now, START_TIMEOUT_S):
                self._on_late(unit)

    def _on_due(self, unit: Unit) -> None:
        if unit.unmapping:
            late = ", ".join(map(str, sorted(unit.unmapping)))
            logger.warning("%s still has memory of %s", late, unit.name)
        if unit.holds_weights and self._reload.has_new_weights():
            self._replace_weights()
        self._start_unit(unit)

    def _on_late(self, unit: Unit) -> None:
        """Raises CannotStart for a unit that has never served."""
        reason = f"{unit.late_members()} did not become ready: no progress for {START_TIMEOUT_S:.0f} s"
        if not unit.has_served and not self._machines.expel(unit, reason, time.monotonic()):
            raise CannotStart(reason)
        logger.error("%s: killed", reason)
        unit.kill()

    def _watch_reload(self) -> None:
        """Begins or continues a reload: ends the next unit, whose open requests are resubmitted."""
        if self._num_hangups:
            self._num_hangups = 0
            is_possible = self._fleet.is_started and not self._is_draining
            self._reload.begin(self._fleet.present, is_possible, time.monotonic())
            self._heartbeat_due = 0.0
        self._retired = [child for child in self._retired if child.process.exit_code is None]
        if self._is_draining:
            return
        if self._reload.waits_since is not None:
            self._close_groups(self._reload.waits_since)
        if (unit := self._reload.next(self._fleet.present)) is None:
            return
        if unit.role is Role.API:  # the successor comes first: connections end with their endpoint
            self._retired += unit.children.values()
            unit.epoch += 1
            self._start_unit(unit)
            return
        unit.on_end(time.monotonic())

    def _close_groups(self, since: float) -> None:
        """Before new weights: clients hold new requests until no request is open, or the timeout is over."""
        self._fleet.close_groups()
        is_over = time.monotonic() - since > self._config.launcher.shutdown_timeout
        if self._fleet.is_idle(since) or is_over:
            self._replace_weights()

    def _replace_weights(self) -> None:
        """Clients end a request that has tokens of the generation before."""
        logger.info("the weights in %s are new: ViTs and LLMs are replaced", self._model.folder)
        self._reload.take_new_weights()
        self._machines.on_new_weights(self._model.folder)
        now = self._heartbeat_due = time.monotonic()
        self._fleet.replace_weights(now)

    def _on_death(self, unit: Unit, now: float) -> None:
        """A member has ended: kills the rest of the unit. Raises CannotStart where no restart would help."""
        self._read_status()  # the error that the worker may have reported
        self._bind_again()  # raises if the run directory is gone, which may be the cause
        if unit.phase is Phase.STARTING:
            for child in unit.children.values():  # a rank may end because of another that is not reaped yet
                child.process.wait(OTHERS_END_S)
        code, reason = unit.first_death()
        if unit.on_death(now, code, self._machines.has_worked(unit)):
            if (num_failed := unit.num_failed_starts) > 1:
                reason += f" ({num_failed} starts in a row have failed)"
            if not self._machines.expel(unit, reason, now):
                raise CannotStart(reason)
        logger.error("%s: it is replaced", reason)
        unit.kill()

    def _on_reaped(self, unit: Unit, now: float) -> None:
        self._fleet.on_reaped(unit, now, self._machines.clean_up(unit))
        # Before the death is published: no client may resubmit before the digests are quarantined.
        self._quarantine.add(unit.role, unit.executed, now)
        self._publish_state()

    def _kill_the_hung(self) -> None:
        if not (patience_s := self._config.launcher.hang_timeout):
            return
        now = time.monotonic()
        serving = [unit for unit in self._fleet.units if unit.is_serving]
        for child in [child for unit in serving for child in unit.children.values()]:
            if self._machines.has_hung(child, now, patience_s):
                logger.error("%s has not moved on for %.0f s: killed", child.worker, now - child.moved_at)
                child.process.kill()

    # End.

    def _drain(self) -> str:
        """Waits for open requests. Returns the reason of a failure, or an empty string."""
        logger.info(
            "shutting down: waiting up to %.0f s for open requests (Ctrl-C again: at once)",
            self._config.launcher.shutdown_timeout,
        )
        self._manager.tell(STOPPING)
        start = time.monotonic()
        end = start + self._config.launcher.shutdown_timeout
        self._is_draining = True
        self._publish_state()

        def is_idle() -> bool:
            if time.monotonic() >= end or not self._fleet.is_started:
                return True
            return self._fleet.is_idle(start, WorkerId(Role.API))

        try:
            self._wait_until(is_idle)
        except _Stopped:
            logger.info("stopping at once")
        except CannotStart as failure:
            return str(failure)
        return ""

    def _stop(self, reason: str) -> None:
        self._publish_state(end=reason)
        self._machines.stop([*self._retired, *self._fleet.children])
        self._sockets.close()
        for listening in self._listening:
            listening.close()
        self._wakeup.close()
        self._manager.close()
