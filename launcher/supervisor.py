"""Starts the workers, watches them, ends them: one poller over their sentinels, their status messages and the signals.

    start all → wait until all are READY → serve until a signal or a death → drain → shut down → reap

The death of a worker ends the pipeline, with that worker's name and reason, and every open request with that reason.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.checkpoints import Model
from launcher.placement import place, workers
from launcher.progress import ProgressBar
from pipeline.config import Config
from pipeline.fork_server import ForkServer, WorkerProcess
from pipeline.messages import (
    ControlMessage,
    Drain,
    PipelineState,
    Shutdown,
    StatusMessage,
    WorkerFailed,
    WorkerReady,
    WorkerState,
    WorkerStats,
)
from pipeline.process import Placement, WorkerSpec
from pipeline.sockets import Poller, Publisher, Receiver, Sockets, Wakeup
from pipeline.topology import CONTROL, STATUS, Role, WorkerId

logger = logging.getLogger(__name__)
FIRST_EPOCH = 1
HEARTBEAT_S = 1.0
START_TIMEOUT_S = 600.0  # without a word from any worker
STOP_TIMEOUT_S = 5.0  # from Shutdown to SIGKILL


@dataclass(slots=True)
class Child:
    worker: WorkerId
    process: WorkerProcess
    ready: WorkerReady | None = None
    stats: WorkerStats | None = None
    stats_time: float = 0.0
    error: str = ""
    error_time: float = math.inf

    @property
    def is_serving(self) -> bool:
        return self.ready is not None


class WorkerDied(Exception):
    """A worker ended that should not have."""


class _Stopped(Exception):
    """A signal asks for the end."""


class Supervisor:
    def __init__(self, config: Config, model: Model, run_dir: Path, environment: dict[str, str]) -> None:
        """`environment` is the workers'."""
        self._config, self._model, self._run_dir = config, model, run_dir
        self._workers = workers(config.num_vits, config.num_ranks)
        self._epochs = dict.fromkeys(self._workers, FIRST_EPOCH)
        self._sockets = Sockets(run_dir, self._epochs)
        self._status: Receiver[StatusMessage] = self._sockets.receiver(STATUS)
        self._control: Publisher[ControlMessage] = self._sockets.publisher(CONTROL)
        self._wakeup = Wakeup()
        self._fork_server = ForkServer(environment)
        self._poller = Poller(self._status, self._control, self._wakeup, self._fork_server)
        self._children: dict[WorkerId, Child] = {}
        self._num_signals = 0
        self._is_draining = False
        self._heartbeat_due = 0.0
        self._last_news = time.monotonic()
        self._progress = ProgressBar()

    def run(self) -> int:
        """Serves until a signal (0) or a failure (1)."""
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        reason = ""
        try:
            self._start()
            self._wait_until(self._is_started)
            self._announce()
            self._wait_until(lambda: False)
        except _Stopped:
            reason = self._drain()
        except WorkerDied as death:
            reason = str(death)
        finally:
            self._progress.close()
            if reason:
                logger.error("%s", reason)
            self._stop(reason)
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 1 if reason else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        self._wakeup.set()

    # Start.

    def _start(self) -> None:
        if self._model.notice:
            logger.info("%s", self._model.notice)
        config = self._config
        placement = place(
            sorted(os.sched_getaffinity(0)), config.num_vits, config.num_ranks, config.llm.llm_cores, config.vit.vit_cores,
            is_elastic=config.launcher.cpu_sharing == "elastic",
        )  # fmt: skip
        for worker in self._workers:
            self._children[worker] = self._start_worker(worker, placement[worker])

    def _start_worker(self, worker: WorkerId, placement: Placement) -> Child:
        spec = WorkerSpec(
            worker=worker, epochs={str(name): epoch for name, epoch in self._epochs.items()}, run_dir=str(self._run_dir),
            model_folder=str(self._model.folder), placement=placement, config=self._config,
        )  # fmt: skip
        return Child(worker, self._fork_server.start(spec))

    def _announce(self) -> None:
        self._progress.close()
        api = self._children[WorkerId(Role.API)].ready
        assert api is not None
        url = f"http://{shown_host(self._config.api.host)}:{api.details['port']}"
        logger.info("serving %s at %s (run directory %s)", self._model.name, url, self._run_dir)
        sys.stdout.write(f"\nServing at {url}/v1 — try:\n\n{example_request(url, self._model, self._config.api.api_key)}\n\n")
        sys.stdout.flush()

    def _is_started(self) -> bool:
        """Raises WorkerDied when nothing has been heard of the start for too long."""
        late = [str(child.worker) for child in self._children.values() if not child.is_serving]
        busy = [name for name in late if time.monotonic() - self._last_news > START_TIMEOUT_S]
        if busy:
            raise WorkerDied(f"{', '.join(busy)} did not become ready: no progress for {START_TIMEOUT_S:.0f} s")
        return not late

    # Watch.

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        """Handles what happens until `is_done`. Raises WorkerDied, and _Stopped at the first signal (outside of a drain)."""
        while True:
            self._wakeup.clear()
            self._read_status()
            if self._num_signals > int(self._is_draining):
                raise _Stopped
            self._check_children()
            has_new = any(event.is_new for event in self._control.subscriptions())
            if has_new or time.monotonic() >= self._heartbeat_due:
                self._publish_state()
            if is_done():
                return
            self._poller.wait(max(0.0, self._heartbeat_due - time.monotonic()))

    def _publish_state(self) -> None:
        self._heartbeat_due = time.monotonic() + HEARTBEAT_S
        states = tuple(
            WorkerState(child.worker, self._epochs[child.worker], child.is_serving, child.ready.credits if child.ready else 0)
            for child in self._children.values()
        )
        if not self._control.publish(PipelineState(workers=states, leads=self._config.leads, is_draining=self._is_draining)):
            logger.debug("a subscriber of the control edge lags behind")

    def _read_status(self) -> None:
        while (received := self._status.receive()) is not None:
            message = received.message
            self._last_news = time.monotonic()
            child = self._children[message.sender]
            match message:
                case WorkerReady():
                    child.ready = message
                    logger.debug("%s is ready %s", child.worker, message.details)
                case WorkerStats():
                    child.stats, child.stats_time = message, time.monotonic()
                    if not child.is_serving:
                        self._progress.show(str(child.worker), message.phase, message.done, message.total)
                case WorkerFailed():
                    child.error, child.error_time = message.error, time.monotonic()

    def _check_children(self) -> None:
        self._fork_server.read()
        dead = [(child.process.exit_code, child) for child in self._children.values() if child.process.exit_code is not None]
        if dead:
            self._read_status()  # their last words
            # One that was killed comes first, then who told its error first: others may have ended because of it, as ranks do.
            code, first = min(dead, key=lambda end: (end[0] >= 0, end[1].error_time))
            raise WorkerDied(f"{first.worker} {_describe_exit(code)}{': ' if first.error else ''}{first.error}")
        if self._fork_server.is_dead:
            raise WorkerDied("the fork server has ended, and with it every worker")

    # End.

    def _drain(self) -> str:
        """Lets open requests finish; returns why that failed, if it did."""
        logger.info("shutting down: waiting up to %.0f s for open requests (Ctrl-C again: at once)", self._config.launcher.shutdown_timeout)
        start = time.monotonic()
        end = start + self._config.launcher.shutdown_timeout
        self._is_draining = True
        self._control.publish(Drain(timeout_s=self._config.launcher.shutdown_timeout))
        busy = [child for child in self._children.values() if child.worker.role in (Role.API, Role.PREPROCESS) or self._is_lead(child.worker)]

        def is_idle() -> bool:
            has_none = all(child.stats is not None and child.stats_time > start and not child.stats.num_open_requests for child in busy)
            return has_none or time.monotonic() >= end or not all(child.is_serving for child in busy)

        try:
            self._wait_until(is_idle)
        except _Stopped:
            logger.info("stopping at once")
        except WorkerDied as death:
            return str(death)
        return ""

    def _is_lead(self, worker: WorkerId) -> bool:
        return worker.role is Role.LLM and worker.rank in self._config.leads

    def _stop(self, reason: str) -> None:
        """Ends and reaps every worker. One that is still starting holds nothing yet, and may not listen yet: it is killed."""
        self._control.publish(Shutdown(reason=reason))
        end = time.monotonic() + STOP_TIMEOUT_S
        for child in self._children.values():
            if not child.is_serving:
                child.process.kill()
        for child in self._children.values():
            if not child.process.wait(max(0.0, end - time.monotonic())):
                logger.warning("%s does not stop: killed", child.worker)
                child.process.kill()
                child.process.wait(STOP_TIMEOUT_S)
        self._fork_server.close()
        self._sockets.close()
        self._wakeup.close()


def shown_host(host: str) -> str:
    """The host as it is written in a URL; for a wildcard, the loopback address, which reaches it from here."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _describe_exit(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def example_request(url: str, model: Model, api_keys: tuple[str, ...]) -> str:
    """A curl command for the shell; with a picture where the model comes with one."""
    key = f" -H {shlex.quote(f'Authorization: Bearer {api_keys[0]}')}" if api_keys else ""
    head = f"curl -s {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d "
    if model.sample is None:
        return head + """'{"messages": [{"role": "user", "content": "Say hello."}]}'"""
    picture = f"""'"$(base64 -w0 {shlex.quote(str(model.sample))})"'"""
    return (
        head + """'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"""
        f"""{picture}"}}}}, {{"type": "text", "text": "What is in this picture?"}}]}}]}}'"""
    )
