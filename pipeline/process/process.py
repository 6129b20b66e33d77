"""The frame of every worker process: its specification, its reports to the launcher, its shutdown."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import sys
import traceback
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pipeline.config import MIB, Config
from pipeline.process import log
from pipeline.process.faults import Faults
from pipeline.process.flight_recorder import digest_of
from pipeline.process.lanes import MAX_UNREAD, Lanes
from pipeline.process.metrics import DROPPED_SPANS, Metrics
from pipeline.process.nodes import NodeMap
from pipeline.process.quarantine import Quarantine
from pipeline.process.trace import tracer_of
from pipeline.transport.cluster import Cluster, NodeSpec
from pipeline.transport.ends import Receiver, Sender
from pipeline.transport.sockets import Sockets
from pipeline.wire.base import Origin, PoolClosed, WorkerMessage
from pipeline.wire.carrying import CarryMessage
from pipeline.wire.control import (
    ControlMessage,
    FirstTokenYielded,
    PipelineState,
    WorkerFailed,
    WorkerReady,
    WorkerState,
    WorkerStats,
)
from pipeline.wire.topology import CARRY, CONTROL, LANES, STATUS, Role, WorkerId, parse_worker

logger = logging.getLogger(__name__)
BEHIND_THE_STEP_LOOP = 5  # niceness of roles that share cores with the LLM
DRAIN_STATS_INTERVAL_S = 0.1  # a drain ends with the statistics that say that no request is open
STATUS_LINGER_MS = 2000  # for the error of a failing worker to be sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a worker computes. On CUDA `device` is the GPU's ordinal."""

    cores: tuple[int, ...]
    num_threads: int
    device: int = 0
    # While the other role is idle, one thread on each; empty: always `cores`.
    wide_cores: tuple[int, ...] = ()
    takes_turns: bool = False  # on `wide_cores`, with the other role, while both have work


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    worker: WorkerId
    epochs: dict[str, int]  # by worker name, its own included
    run_dir: str
    model_folder: str
    placement: Placement
    config: Config
    quarantined: dict[Role, tuple[bytes, ...]] = field(default_factory=dict)  # as in `PipelineState`
    node: NodeSpec | None = None  # of a pipeline over several machines


class ControlNews(NamedTuple):
    is_draining: bool  # open requests are to be finished
    is_retiring: bool  # this worker: its successor serves already
    died: Sequence[WorkerState]  # the successors of workers that have died
    states: tuple[WorkerState, ...] | None  # of all workers; None without a new `PipelineState`


class WorkerContext:
    """What `run_worker` hands to a worker's main function."""

    def __init__(self, spec: WorkerSpec, fds: Sequence[int] = ()) -> None:
        num_doors = 0 if spec.node is None else len(spec.node.doors)
        # Descriptors from the launcher behind those of the doors to other nodes; api's listening sockets.
        self.spec, self.fds = spec, fds[num_doors:]
        self.config = spec.config
        self.model_folder = Path(spec.model_folder)
        self.worker = spec.worker
        self.epoch = spec.epochs[str(spec.worker)]
        epochs = {parse_worker(name): epoch for name, epoch in spec.epochs.items()}
        self.faults = Faults(spec.config.launcher.fault, spec.worker)
        self.cluster = None if spec.node is None else Cluster(spec.node, fds[:num_doors], spec.worker.role)
        self.sockets = Sockets(Path(spec.run_dir), epochs, self.faults.encoder(), cluster=self.cluster)
        self.status: Sender[WorkerMessage] = self.sockets.sender(STATUS)
        self.lanes = Lanes(self.origin, lambda: self.sockets.sender(LANES, high_water_mark=MAX_UNREAD))
        self.tracer = tracer_of(spec.config.launcher, spec.worker, self.lanes)
        self.recorder = self.faults.recorder(Path(spec.run_dir), self.epoch)
        self.quarantine = Quarantine(spec.worker.role, spec.quarantined)
        self.metrics = Metrics()
        self.nodes = NodeMap(spec.node, spec.config.cluster.nnodes)
        if (otlp := self.tracer.otlp) is not None:
            self.metrics.counter("dropped_spans", DROPPED_SPANS, lambda: otlp.num_dropped)

    def far_sites(self) -> Cluster | None:
        """For further sockets of this worker, which bind nothing. None on a single machine."""
        spec = self.spec.node
        return None if spec is None else Cluster(replace(spec, doors=()), (), self.worker.role)

    @property
    def origin(self) -> Origin:
        return {"sender": self.worker, "epoch": self.epoch}

    def sender_to_carrier(self) -> Sender[CarryMessage] | None:
        """To the carrier of this node, if there are several nodes."""
        carrier = self.nodes.carrier
        return None if carrier is None else self.sockets.sender(CARRY, carrier.rank)

    def epoch_of(self, worker: WorkerId) -> int:
        """The last known."""
        return self.sockets.epochs.get(worker, 0)

    def control(self) -> Receiver[ControlMessage]:
        return self.sockets.subscriber(CONTROL)

    def ready(self, num_credits: int = 0, **details: int) -> None:
        self.status.send(WorkerReady(credits=num_credits, details=details, **self.origin))
        self.faults.at_ready(self.epoch)

    def progress(self, phase: str, done: int, total: int) -> None:
        self.status.try_send(WorkerStats(phase=phase, done=done, total=total, **self.origin))

    def stats(self, num_open_requests: int) -> None:
        """Reports all metrics, about once a second, and binds sockets again whose files were removed."""
        for path in self.sockets.bind_again():
            logger.warning("%s was removed: bound again", path)
        stats = WorkerStats(
            phase="serving",
            num_open_requests=num_open_requests,
            counters=self.metrics.values(),
            metrics=self.metrics.told(),
            **self.origin,
        )
        self.status.try_send(stats)
        self.lanes.flush()

    def pool_closed(self, worker: WorkerId, epoch: int) -> None:
        """Reports that this process has unmapped the pool of a dead worker."""
        self.status.send(PoolClosed(pool_id=str(worker), pool_epoch=epoch, **self.origin))

    def on_first_token(self, request_id: str) -> None:
        """Reports the first new token of a quarantined request."""
        if request_id in self.quarantine:
            self.status.try_send(FirstTokenYielded(digest=digest_of(request_id), **self.origin))

    def is_current(self, message: WorkerMessage) -> bool:
        """Whether the sender is the last known incarnation, or a later one."""
        return message.epoch >= self.sockets.epochs.get(message.sender, 0)

    def follow(self, state: PipelineState) -> ControlNews:
        """Learns which requests are quarantined, and connects to the successors of workers that died.

        Raises ShutdownRequested when the pipeline ends.
        """
        if state.end is not None:
            raise ShutdownRequested
        self.quarantine.learn(state.quarantined)
        self.lanes.watch(state.is_watched)
        renewed = self.sockets.follow(state)
        died = [worker for worker in state.workers if worker.worker in renewed]
        is_retiring = (self.worker, self.epoch) in state.retiring
        return ControlNews(state.is_draining, is_retiring, died, state.workers)

    def read_control(self, control: Receiver[ControlMessage]) -> ControlNews:
        """Follows the states that were published since the last call."""
        news = ControlNews(False, False, [], None)
        while (received := control.receive()) is not None:
            latest = self.follow(received.message)
            news = latest._replace(died=[*news.died, *latest.died])
        return news


def run_async(serve: Coroutine[Any, Any, None]) -> None:
    """Runs an asynchronous worker; ShutdownRequested, raised in any task, ends it in order."""
    import uvloop

    try:
        uvloop.run(serve)
    except* ShutdownRequested:
        pass


def limit_memory(allowed_mib: int) -> None:
    """Limits private memory to the present size plus `allowed_mib`: beyond, this process fails alone."""
    taken = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:")
    )
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = 1024 * int(taken.split()[1]) + allowed_mib * MIB
    resource.setrlimit(
        resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard)
    )


class ShutdownRequested(Exception):
    """The launcher ends the pipeline: unwinds a worker's loop."""


def run_worker(module: str, spec: WorkerSpec, fds: Sequence[int] = ()) -> NoReturn:
    """Runs `main(context)` of a module to its end and exits the process: 0 after an orderly shutdown, 1 after
    an error."""
    os.sched_setaffinity(0, spec.placement.cores)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # connections, downloads, videos
    if spec.worker.role in (Role.API, Role.PREPROCESS, Role.GATEWAY):
        os.nice(BEHIND_THE_STEP_LOOP)
    log.configure(str(spec.worker), spec.config.launcher.log_level)
    context = WorkerContext(spec, fds)
    code = 0
    try:
        main: Callable[[WorkerContext], None] = importlib.import_module(module).main
        main(context)
    except ShutdownRequested:
        pass
    except Exception as error:
        # ValueError and OSError are wrong options and explain themselves; a bug needs its traceback.
        logger.log(
            logging.DEBUG if isinstance(error, ValueError | OSError) else logging.ERROR,
            "failed",
            exc_info=True,
        )
        context.status.send(WorkerFailed(error=_explain(error), **context.origin))
        code = 1
    context.sockets.close(linger_ms=STATUS_LINGER_MS)
    context.tracer.flush()
    sys.stderr.flush()
    os._exit(code)  # without waiting for threads, which may be inside a library


def _explain(error: Exception) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
