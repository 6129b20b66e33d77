"""A reload: every unit is replaced, one at a time, the next when all serve again.

Where the folder has new weights, ViTs and LLMs are replaced all at once when no request is open, so that no
request is computed with two generations of weights.

Pure, but for reading the model's folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from launcher.units import Unit
from pipeline.adapters import read_adapter
from pipeline.wire.control import ReloadState

logger = logging.getLogger(__name__)
WEIGHTS = ".safetensors"


def settings_fingerprint(folder: Path, adapters: Sequence[Path] = ()) -> str:
    """Of the content of all files but the weights, and of what layers the adapters in these folders have."""
    digest = hashlib.sha256()
    for place in adapters:
        adapter = read_adapter("", place)
        digest.update(repr(sorted(adapter.modules.items())).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix != WEIGHTS and not path.name.endswith(f"{WEIGHTS}.index.json"):
            digest.update(repr((path.name, path.read_bytes() if path.is_file() else b"")).encode())
    return digest.hexdigest()


def weights_fingerprint(folder: Path, adapters: Sequence[Path] = ()) -> str:
    """Of the names, inodes, sizes and times of the weight files."""
    digest = hashlib.sha256()
    for place in (folder, *adapters):
        for path in sorted(place.glob(f"*{WEIGHTS}*")):
            info = path.stat()
            digest.update(repr((path.name, info.st_ino, info.st_size, info.st_mtime_ns)).encode())
    return digest.hexdigest()


def has_whole_weights(folder: Path) -> bool:
    """Whether all files are there that the index names; without an index, any."""
    named: set[str] = set()
    for path in folder.glob(f"*{WEIGHTS}.index.json"):
        named |= set(json.loads(path.read_bytes())["weight_map"].values())
    there = {path.name for path in folder.glob(f"*{WEIGHTS}")}
    return bool(there) and named <= there


class Reload:
    """Refused where config or tokenizer have changed, or which layers an adapter has: old and new workers
    could not work together. `adapters`: their folders."""

    def __init__(self, folder: Path, adapters: Sequence[Path] = ()) -> None:
        self._folder, self._adapters = folder, adapters
        self._settings = settings_fingerprint(folder, adapters)
        self._weights = weights_fingerprint(folder, adapters)
        self._queue: list[Unit] = []
        self.waits_since: float | None = None  # for open requests to end, before new weights are loaded
        self.state = ReloadState()

    def begin(self, units: Sequence[Unit], is_possible: bool, now: float) -> None:
        """`is_possible`: the pipeline has started and does not end."""
        number, refusal = self.state.number + 1, ""
        if self.state.is_running:
            refusal = "a reload is under way"
        elif not is_possible:
            refusal = "the server is starting or stopping"
        elif self._has_new_settings():
            what = "other files than the weights have changed"
            places = ", ".join(map(str, (self._folder, *self._adapters)))
            refusal = f"{what} in {places} since the server started: start it anew"
        if refusal:
            logger.error("no reload: %s", refusal)
        elif self.has_new_weights():
            logger.info("reload: new weights are loaded when no request is open")
            self.waits_since = now
        else:
            logger.info("reload: all workers are replaced, one at a time")
            self._queue = list(units)
        is_running = self.state.is_running or not refusal
        self.state = ReloadState(number, is_running, refusal, self.state.generation)

    def _has_new_settings(self) -> bool:
        try:
            return settings_fingerprint(self._folder, self._adapters) != self._settings
        except (OSError, ValueError):
            return True

    def has_new_weights(self) -> bool:
        """Whether a worker that starts now would load other weights than the serving ones have."""
        try:
            fingerprint = weights_fingerprint(self._folder, self._adapters)
            for place in self._adapters:
                read_adapter("", place)
            return fingerprint != self._weights and has_whole_weights(self._folder)
        except (OSError, ValueError, LookupError):
            return False  # the loader reports what is wrong with the files

    def take_new_weights(self) -> None:
        """Begins the next generation; workers with older weights are to be ended."""
        self._weights, self.waits_since = weights_fingerprint(self._folder, self._adapters), None
        generation = self.state.generation + 1
        self.state = msgspec.structs.replace(self.state, is_running=True, generation=generation)

    def next(self, units: Sequence[Unit]) -> Unit | None:
        """The unit to be replaced now, if any."""
        is_waiting = self.waits_since is not None
        if not self.state.is_running or is_waiting or not all(unit.is_serving for unit in units):
            return None
        self._queue = [unit for unit in self._queue if not unit.is_absent]
        if self._queue:
            return self._queue.pop(0)
        logger.info("reload: done")
        self.state = msgspec.structs.replace(self.state, is_running=False)
        return None
