"""The thread that encodes, so that the loop handles releases and cancellations while the device works."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

import torch

from pipeline.process.core_sharing import CoreSharing
from pipeline.transport.poller import Wakeup
from workers.vit.engines.choice import VitEngine
from workers.vit.models.base import EncodeJob


class EngineThread:
    """Encodes one batch at a time. `take_done` raises the engine's errors in the worker's loop."""

    def __init__(self, engine: VitEngine, device: torch.device, sharing: CoreSharing, wakeup: Wakeup) -> None:
        self._engine, self._device, self._sharing, self._wakeup = engine, device, sharing, wakeup
        self._jobs: queue.SimpleQueue[Sequence[EncodeJob]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | float] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # the current device is a thread's own
        self._sharing.bind()
        while True:
            jobs = self._jobs.get()
            self._sharing.enter()
            start = time.monotonic()
            try:
                self._engine.encode(jobs)
            except BaseException as error:  # noqa: BLE001  raised again in the worker's loop
                self._done.put(error)
            else:
                self._done.put(time.monotonic() - start)
            self._sharing.leave()
            self._wakeup.set()

    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        self._jobs.put(jobs)

    def take_done(self) -> float | None:
        """The seconds that the batch took; None while it is not done. Raises the engine's error."""
        try:
            done = self._done.get_nowait()
        except queue.Empty:
            return None
        if isinstance(done, BaseException):
            raise done
        return done
