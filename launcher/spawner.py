"""Starts worker processes and reaps them, with the files of each: its flight recorder and its sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.cores import usable_cores
from launcher.members import doors_of
from launcher.placement import by_global_rank, place
from launcher.units import Child, has_moved
from pipeline.config import Config
from pipeline.process.core_sharing import IDLE, Activity
from pipeline.process.flight_recorder import FlightRecorder
from pipeline.process.fork_server import ForkServer
from pipeline.process.process import WorkerSpec
from pipeline.transport.cluster import NO_NODES, Far, NodeSpec, listen_at, url_of
from pipeline.wire.topology import EDGES, Role, WorkerId, socket_name

logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 5.0  # from the published end to SIGKILL
UNRECORDED = (Role.API, Role.GATEWAY, Role.CARRIER)  # they execute no requests: READY is all they prove


class Spawner:
    def __init__(
        self,
        config: Config,
        model_folder: Path,
        run_dir: Path,
        environment: Mapping[str, str],
        workers: Sequence[WorkerId],
        node: NodeSpec | None = None,
        inherited: Sequence[int] = (),
    ) -> None:
        """`environment` is the workers', `workers` those of this node, `node` its place among several.
        `inherited`: see `ForkServer`."""
        self._config, self._model_folder, self._run_dir, self._node = config, model_folder, run_dir, node
        self._placement = place(
            usable_cores(list(os.sched_getaffinity(0))), *_counts(workers),
            config.llm.llm_cores, config.vit.vit_cores,
            is_elastic=config.launcher.cpu_sharing != "fixed",
            # One group has one rhythm of steps; an encoder of onnxruntime cannot pause.
            can_take_turns=config.launcher.cpu_sharing == "elastic"
            and config.llm.dp == 1
            and config.vit.vit_engine != "onnxruntime",
        )  # fmt: skip
        if node is not None:
            self._placement = by_global_rank(self._placement, workers)
        self._recorders = {worker: FlightRecorder(run_dir, worker) for worker in workers}
        self._activity = Activity(run_dir)
        self._fork_server = ForkServer(environment, inherited)

    def start(self) -> None:
        self._fork_server.start()

    def fileno(self) -> int:
        return self._fork_server.fileno()

    def read(self) -> bool:
        """Brings every process up to date. False: the fork server has ended, and every worker with it."""
        self._fork_server.read()
        return not self._fork_server.is_dead

    def has(self, worker: WorkerId) -> bool:
        return worker in self._recorders

    def has_moved(self, child: Child, now: float, patience_s: float) -> bool:
        return has_moved(child, self._recorders[child.worker], now, patience_s)

    def worked(self, worker: WorkerId) -> bool:
        return self._recorders[worker].has_worked or worker.role in UNRECORDED

    def fork(
        self,
        worker: WorkerId,
        epochs: dict[str, int],
        quarantined: dict[Role, tuple[bytes, ...]],
        far: Far = NO_NODES,
        listening: Sequence[socket.socket] = (),
    ) -> Child:
        """`epochs`: by worker name, its own included. `listening`: the sockets of the HTTP endpoint."""
        self._renew_recorder(worker)
        with contextlib.ExitStack() as opened:
            doors = {label: opened.enter_context(self._listen()) for label in doors_of(worker, self._config)}
            node = self._node and dataclasses.replace(
                self._node, doors=tuple(doors), keys=far.keys, urls=far.urls
            )
            spec = WorkerSpec(
                worker=worker, epochs=epochs, run_dir=str(self._run_dir),
                model_folder=str(self._model_folder),
                placement=self._placement[worker], config=self._config, quarantined=quarantined, node=node,
            )  # fmt: skip
            http = listening if worker.role is Role.API else ()
            process = self._fork_server.fork(spec, [one.fileno() for one in (*doors.values(), *http)])
            urls = {label: url_of(door.fileno()) for label, door in doors.items()}
        return Child(worker, epochs[str(worker)], process, urls)

    def _listen(self) -> socket.socket:
        """A port of its own for each edge of each incarnation: what was sent to a dead worker reaches no
        successor."""
        cluster = self._config.cluster
        return listen_at(cluster.node_address, cluster.ports())

    def _renew_recorder(self, worker: WorkerId) -> None:
        """Clears the file for a new incarnation; makes it anew where something has removed it."""
        if not self._recorders[worker].path.exists():
            self._recorders[worker].close()
            self._recorders[worker] = FlightRecorder(self._run_dir, worker)
        self._recorders[worker].clear()

    def clean_up_worker(self, worker: WorkerId, epoch: int) -> tuple[bytes, ...]:
        """Removes the sockets of a reaped worker. Returns the digests of the requests that it executed."""
        if worker.role in (Role.LLM, Role.VIT):
            self._activity.announce(worker, IDLE)
        for edge in EDGES:
            if edge.binder is worker.role:
                (self._run_dir / socket_name(edge, worker.rank, epoch)).unlink(missing_ok=True)
        return tuple(sorted(self._recorders[worker].executing()))

    def stop(self, children: Sequence[Child]) -> None:
        """Reaps every worker, after the end was published. A worker that is not READY may not read it yet:
        it is killed."""
        end = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            if child.ready is None:
                child.process.kill()
        for child in children:
            if not child.process.wait(max(0.0, end - time.monotonic())):
                logger.warning("%s does not stop: killed", child.worker)
                child.process.kill()
                child.process.wait(STOP_TIMEOUT_S)
        self._fork_server.close()


def _counts(workers: Sequence[WorkerId]) -> tuple[int, int]:
    """How many ViTs and LLM ranks."""
    roles = [worker.role for worker in workers]
    return roles.count(Role.VIT), roles.count(Role.LLM)
