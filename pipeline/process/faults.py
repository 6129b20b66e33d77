"""Faults for tests: `--fault ROLE:ACTION:WHAT[:NUMBER]`, an option only where the test extra is installed.

    kill, stop, fail   when a request whose id contains WHAT executes there (SIGKILL, SIGSTOP, an exception);
                       NUMBER: in so many incarnations
    delay              such a request executes NUMBER seconds later
    slow               each layer of a step takes NUMBER seconds longer; WHAT is "layer"
    drop, corrupt      the first NUMBER messages of type WHAT that the worker sends
    fill               the worker's whole tensor pool but its reserve; WHAT is "pool"
    end                the worker fails once it is ready; WHAT is "ready"; NUMBER: in so many incarnations

No code of a worker knows of faults: they sit in its flight recorder, its sockets and its allocator.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pipeline.config.faults import AT_EXECUTION, AT_SENDING, Fault
from pipeline.process.flight_recorder import FlightRecorder
from pipeline.transport.slots import SlotAllocator
from pipeline.wire.topology import WorkerId


def are_available() -> bool:
    """Whether the test extra is installed."""
    return importlib.util.find_spec("pytest") is not None


class InjectedFault(Exception):
    pass


class FaultyRecorder(FlightRecorder):
    def __init__(self, run_dir: Path, worker: WorkerId, epoch: int, faults: Sequence[Fault]) -> None:
        super().__init__(run_dir, worker)
        self._epoch, self._faults = epoch, [fault for fault in faults if fault.action in AT_EXECUTION]
        self._layer_s = sum(fault.number for fault in faults if fault.action == "slow")

    def record(self, request_ids: Iterable[str]) -> None:
        ids = list(request_ids)
        super().record(ids)
        for fault in self._faults:
            if any(fault.what in request_id for request_id in ids):
                self._act(fault)

    def move_in_step(self) -> None:
        super().move_in_step()
        if self._layer_s:
            time.sleep(self._layer_s)

    def _act(self, fault: Fault) -> None:
        if fault.action == "delay":
            time.sleep(fault.number)
        elif self._epoch > fault.number:
            return
        elif fault.action == "fail":
            raise InjectedFault(f"fault: {fault.what}")
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)


class FaultyEncoder:
    """In place of a msgspec encoder: returns None to drop a message."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._faults = faults
        self._counts: dict[Fault, int] = dict.fromkeys(faults, 0)

    def encode(self, message: Any) -> bytes | None:
        data = self._encoder.encode(message)
        for fault in self._faults:
            if type(message).__name__ == fault.what and self._counts[fault] < fault.number:
                self._counts[fault] += 1
                return None if fault.action == "drop" else bytes(byte ^ 0x5A for byte in data)
        return data


class Faults:
    """The faults of one worker."""

    def __init__(self, texts: Iterable[str], worker: WorkerId) -> None:
        self._worker = worker
        self._faults = [fault for fault in map(Fault.parse, texts) if fault.role == worker.role]

    def _of(self, *actions: str) -> list[Fault]:
        return [fault for fault in self._faults if fault.action in actions]

    def recorder(self, run_dir: Path, epoch: int) -> FlightRecorder:
        faults = self._of(*AT_EXECUTION, "slow")
        return (
            FaultyRecorder(run_dir, self._worker, epoch, faults)
            if faults
            else FlightRecorder(run_dir, self._worker)
        )

    def encoder(self) -> FaultyEncoder | None:
        faults = self._of(*AT_SENDING)
        return FaultyEncoder(faults) if faults else None

    def at_ready(self, epoch: int) -> None:
        for fault in self._of("end"):
            if epoch <= fault.number:
                raise InjectedFault(f"fault: {fault.what}")

    def fill(self, allocator: SlotAllocator) -> None:
        """Leaves only the reserve."""
        if self._of("fill"):
            while allocator.allocate(allocator.reserve) is not None:
                pass
            nbytes = allocator.reserve
            while nbytes >= 256:
                if allocator.allocate(nbytes) is None:
                    nbytes //= 2
