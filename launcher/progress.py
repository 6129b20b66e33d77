"""Progress of loading on the terminal: one bar over all workers; plain lines where there is no terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)


class ProgressBar:
    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._bar: Any = None
        self._last_tenth = -1

    def show(self, worker: str, phase: str, done: int, total: int) -> None:
        """`worker` has done `done` of `total` of its `phase`."""
        self._done[worker], self._totals[worker] = done, total
        all_done, all_total = sum(self._done.values()), sum(self._totals.values())
        if not sys.stderr.isatty():
            tenth = 10 * all_done // max(1, all_total)
            if tenth != self._last_tenth and (tenth in (0, 5, 10)):
                self._last_tenth = tenth
                logger.info("%s: %d of %d tensors", phase, all_done, all_total)
            return
        if self._bar is None:
            self._bar = tqdm(desc=phase, unit="tensor", leave=False)
        self._bar.total = all_total
        self._bar.update(all_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
