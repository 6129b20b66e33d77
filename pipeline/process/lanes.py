"""What a worker tells of its pieces of work while somebody looks at the lanes (docs/lanes.md).

Nothing is kept, and no socket is opened, while nobody looks. Nothing waits: what does not fit is dropped and
counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pipeline.wire.base import Origin
from pipeline.wire.lanes import MAX_SHOWN_REQUESTS, MAX_SHOWN_SPANS, LaneSpan, WorkDone

INTERVAL_S = 0.2  # between two messages
MAX_GAP_S = 0.005  # between steps that are told as one
LONG_STEP = 2.0  # times the mean of the steps before: such a step is told by itself
SHORT_S = 0.010  # a step so short is never long
MAX_UNREAD = 32  # messages, some seconds of them, by which the reader may lag


class LanesEnd(Protocol):
    def try_send(self, message: WorkDone) -> bool: ...


@dataclass(slots=True)
class _Run:
    """Steps in a row that are alike."""

    name: str
    start: float
    end: float | None
    request_ids: tuple[str, ...]
    amount: int
    num_steps: int

    def takes(self, name: str, start: float, end: float, request_ids: tuple[str, ...]) -> bool:
        if self.end is None or name != self.name or request_ids != self.request_ids:
            return False
        if start - self.end > MAX_GAP_S:
            return False
        return end - start <= max(SHORT_S, LONG_STEP * (self.end - self.start) / self.num_steps)

    def add(self, end: float, amount: int) -> None:
        self.end = end
        self.amount += amount
        self.num_steps += 1

    def span(self) -> LaneSpan:
        return LaneSpan(self.name, self.start, self.end, self.request_ids, self.amount, self.num_steps)


class Lanes:
    """`open_end` opens the edge, once there is something to tell."""

    def __init__(self, origin: Origin, open_end: Callable[[], LanesEnd]) -> None:
        self._origin, self._open_end = origin, open_end
        self._end: LanesEnd | None = None
        self._runs: list[_Run] = []
        self._sent_at = 0.0
        self.is_watched = False
        self.num_dropped = 0

    def watch(self, is_watched: bool) -> None:
        """Whether somebody looks from now on."""
        self.is_watched = is_watched
        if not is_watched:
            self._runs.clear()

    def add(
        self,
        name: str,
        start: float,
        end: float | None,
        request_ids: tuple[str, ...],
        amount: int,
        is_step: bool = False,
    ) -> None:
        """A piece of work; without an `end` it goes on. Only a step is told together with the one before."""
        if not self.is_watched:
            return
        request_ids = request_ids[:MAX_SHOWN_REQUESTS]
        if is_step and end is not None and self._runs and self._runs[-1].takes(name, start, end, request_ids):
            self._runs[-1].add(end, amount)
        elif len(self._runs) < MAX_SHOWN_SPANS:
            self._runs.append(_Run(name, start, end, request_ids, amount, 1))
        else:
            self.num_dropped += 1
        self.flush()

    def flush(self) -> None:
        """Tells what there is, at most once every `INTERVAL_S`."""
        if not self._runs or (now := time.monotonic()) - self._sent_at < INTERVAL_S:
            return
        self._sent_at = now
        if self._end is None:
            self._end = self._open_end()
        spans = tuple(run.span() for run in self._runs)
        if not self._end.try_send(WorkDone(spans=spans, num_dropped=self.num_dropped, **self._origin)):
            self.num_dropped += len(spans)
        self._runs.clear()
