"""What the workers do while they start: on a terminal one line that is drawn anew, with each worker's phase,
rate and remaining time; elsewhere a few plain lines.

Log lines of all processes erase the drawn line first (`pipeline/process/log.py`).
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.process.log import ERASE
from pipeline.process.phases import LOADING

logger = logging.getLogger(__name__)
REDRAW_S = 0.1
GIB, MIB = 1 << 30, 1 << 20
SHOWN_TENTHS = (0, 5, 10)  # in a log


@dataclass(slots=True)
class _Phase:
    """What one worker does. Without a total, nobody knows how much there is to do."""

    name: str
    began: float
    done: int = 0
    total: int = 0

    def text(self, now: float) -> str:
        seconds = now - self.began
        if self.total <= 1:
            return f"{self.name} {_duration(seconds)}"
        share = f"{self.name} {100 * self.done // self.total}%"
        if self.name != LOADING:
            return share
        text = f"{share} of {shown_bytes(self.total)}"
        if self.done and seconds > 0 and self.done < self.total:
            rate = self.done / seconds
            text += f", {shown_bytes(rate)}/s, {_duration((self.total - self.done) / rate)} left"
        return text


class StartProgress:
    """`clock`: a steady clock, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phases: dict[str, _Phase] = {}
        self._is_drawn, self._drawn_at, self._last_tenth = False, 0.0, -1

    def show(self, worker: str, phase: str, done: int, total: int) -> None:
        """`worker` has done `done` of `total` of its `phase`: bytes while it loads weights, else steps."""
        now = self._clock()
        known = self._phases.get(worker)
        if known is None or known.name != phase:
            known = self._phases[worker] = _Phase(phase, now)
            self._drawn_at = 0.0
        known.done, known.total = done, total
        if sys.stderr.isatty():
            self._draw(now)
        elif phase == LOADING:
            self._log()

    def on_ready(self, worker: str) -> None:
        if worker in self._phases:
            self._phases[worker] = _Phase("ready", self._clock(), 1, 1)

    def _draw(self, now: float) -> None:
        if now - self._drawn_at < REDRAW_S:
            return
        self._drawn_at, self._is_drawn = now, True
        texts = (
            f"{worker}: {phase.name if phase.name == 'ready' else phase.text(now)}"
            for worker, phase in sorted(self._phases.items())
        )
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(ERASE + " · ".join(texts)[:width])
        sys.stderr.flush()

    def _log(self) -> None:
        loading = [phase for phase in self._phases.values() if phase.name == LOADING]
        done, total = (sum(getattr(phase, name) for phase in loading) for name in ("done", "total"))
        tenth = 10 * done // max(1, total)
        if tenth > self._last_tenth and tenth in SHOWN_TENTHS:
            self._last_tenth = tenth
            logger.info("%s: %s of %s", LOADING, shown_bytes(done), shown_bytes(total))

    def close(self) -> None:
        """Nothing of the drawn line is left."""
        if self._is_drawn:
            self._is_drawn = False
            sys.stderr.write(ERASE)
            sys.stderr.flush()


def shown_bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
