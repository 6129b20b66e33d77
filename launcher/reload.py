"""A reload: every worker is replaced, one unit at a time, the next when all serve again.

Pure, but for a look at the model's folder.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from launcher.units import Unit
from pipeline.wire.messages import ReloadState

logger = logging.getLogger(__name__)


def fingerprint(folder: Path) -> str:
    """Of a checkpoint: the content of its small files, the size and time of its weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        info = path.stat()
        content = (
            (info.st_size, info.st_mtime_ns)
            if path.suffix == ".safetensors"
            else path.read_bytes()
            if path.is_file()
            else b""
        )
        digest.update(repr((path.name, content)).encode())
    return digest.hexdigest()


class Reload:
    """Of the same checkpoint only: workers of two models would not understand one another."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._fingerprint = folder, fingerprint(folder)
        self._queue: list[Unit] = []
        self.state = ReloadState()

    def begin(self, units: Sequence[Unit], is_possible: bool) -> None:
        """`is_possible`: the pipeline has started and does not end."""
        number, refusal = self.state.number + 1, ""
        if self._queue:
            refusal = "a reload is under way"
        elif not is_possible:
            refusal = "the server is starting or stopping"
        elif self._has_changed():
            refusal = f"the files of {self._folder} are not those that the server started with: start it anew"
        if refusal:
            logger.error("no reload: %s", refusal)
        else:
            logger.info("reload: all workers are replaced, one at a time")
            self._queue = list(units)
        self.state = ReloadState(number, self.state.is_running if refusal else True, refusal)

    def _has_changed(self) -> bool:
        try:
            return fingerprint(self._folder) != self._fingerprint
        except OSError:
            return True

    def next(self, units: Sequence[Unit]) -> Unit | None:
        """The unit to be replaced now, if it is somebody's turn."""
        if not self.state.is_running or not all(unit.is_serving for unit in units):
            return None
        if self._queue:
            return self._queue.pop(0)
        logger.info("reload: done")
        self.state = ReloadState(self.state.number, False)
        return None
