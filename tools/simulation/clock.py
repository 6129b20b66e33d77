"""Simulated time: events in order, and nothing in between."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Event:
    call: Callable[[], None]
    is_cancelled: bool = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Clock:
    """Events of one time happen in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._number = itertools.count()

    def after(self, seconds: float, call: Callable[[], None]) -> Event:
        """Raises ValueError for a time before now."""
        if seconds < 0:
            raise ValueError(f"an event cannot be {-seconds} s ago")
        event = Event(call)
        heapq.heappush(self._events, (self.now + seconds, next(self._number), event))
        return event

    def run(self) -> None:
        """Until there are no more events."""
        while self._events:
            at, _, event = heapq.heappop(self._events)
            if not event.is_cancelled:
                self.now = at
                event.call()


class Busy:
    """How long the servers of a stage have worked, added up, and when."""

    def __init__(self, name: str, num_servers: int) -> None:
        self.name, self.num_servers, self.seconds = name, num_servers, 0.0
        self.spans: list[tuple[int, float, float]] = []  # server, start, end

    def add(self, server: int, start: float, end: float) -> None:
        self.seconds += end - start
        self.spans.append((server, start, end))

    def utilisation(self, wall: float) -> float:
        return self.seconds / (wall * self.num_servers) if wall else 0.0
