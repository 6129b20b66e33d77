"""Starts worker processes and reaps them, with the files of each: its flight recorder and its sockets."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.cores import usable_cores
from launcher.placement import place
from launcher.units import Child, Unit
from pipeline.config import Config
from pipeline.process.core_sharing import IDLE, Activity
from pipeline.process.flight_recorder import FlightRecorder
from pipeline.process.fork_server import ForkServer
from pipeline.process.process import WorkerSpec
from pipeline.wire.topology import EDGES, Role, WorkerId, socket_name

logger = logging.getLogger(__name__)
STOP_TIMEOUT_S = 5.0  # from the published end to SIGKILL
UNRECORDED = (Role.API, Role.GATEWAY)  # they execute no requests: to be ready is all that they prove


class Spawner:
    def __init__(
        self,
        config: Config,
        model_folder: Path,
        run_dir: Path,
        environment: Mapping[str, str],
        workers: Sequence[WorkerId],
    ) -> None:
        """`environment` is the workers'."""
        self._config, self._model_folder, self._run_dir = config, model_folder, run_dir
        self._placement = place(
            usable_cores(list(os.sched_getaffinity(0))), config.num_vits, config.num_ranks,
            config.llm.llm_cores, config.vit.vit_cores,
            is_elastic=config.launcher.cpu_sharing != "fixed",
            # One group has one rhythm of steps; an encoder of onnxruntime cannot pause.
            can_take_turns=config.launcher.cpu_sharing == "elastic"
            and len(config.leads) == 1
            and config.vit.vit_engine != "onnxruntime",
        )  # fmt: skip
        self._recorders = {worker: FlightRecorder(run_dir, worker) for worker in workers}
        self._activity = Activity(run_dir)
        self._fork_server = ForkServer(environment)

    def start(self) -> None:
        self._fork_server.start()

    def fileno(self) -> int:
        return self._fork_server.fileno()

    def read(self) -> bool:
        """Brings every process up to date. False: the fork server has ended, and every worker with it."""
        self._fork_server.read()
        return not self._fork_server.is_dead

    def recorder_of(self, worker: WorkerId) -> FlightRecorder:
        return self._recorders[worker]

    def has_worked(self, unit: Unit) -> bool:
        return any(self._recorders[worker].has_worked or worker.role in UNRECORDED for worker in unit.members)

    def fork(
        self,
        unit: Unit,
        epochs: dict[str, int],
        quarantined: dict[Role, tuple[bytes, ...]],
        listening: Sequence[socket.socket],
    ) -> list[Child]:
        """`listening`: the sockets of the HTTP endpoint."""
        children: list[Child] = []
        for worker in unit.members:
            self._renew_recorder(worker)
            spec = WorkerSpec(
                worker=worker, epochs=epochs, run_dir=str(self._run_dir),
                model_folder=str(self._model_folder),
                placement=self._placement[worker], config=self._config, quarantined=quarantined,
            )  # fmt: skip
            fds = [one.fileno() for one in listening] if worker.role is Role.API else []
            children.append(Child(worker, unit.epoch, self._fork_server.fork(spec, fds)))
        return children

    def _renew_recorder(self, worker: WorkerId) -> None:
        """Clears the file for a new incarnation; makes it anew where something has removed it."""
        if not self._recorders[worker].path.exists():
            self._recorders[worker].close()
            self._recorders[worker] = FlightRecorder(self._run_dir, worker)
        self._recorders[worker].clear()

    def clean_up(self, unit: Unit) -> tuple[bytes, ...]:
        """Removes the sockets of a reaped unit. Returns the digests of the requests that were executing."""
        executed: set[bytes] = set()
        for worker in unit.members:
            executed.update(self._recorders[worker].executing())
            if worker.role in (Role.LLM, Role.VIT):
                self._activity.announce(worker, IDLE)
            for edge in EDGES:
                if edge.binder is worker.role:
                    (self._run_dir / socket_name(edge, worker.rank, unit.epoch)).unlink(missing_ok=True)
        return tuple(sorted(executed))

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
