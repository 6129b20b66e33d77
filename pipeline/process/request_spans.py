"""The spans of the requests that a worker knows, each within its client's trace. Pure but for `send`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from pipeline.process.otlp import Attributes
from pipeline.wire.trace_context import TraceContext

MAX_FOLLOWED = 16384  # requests; the oldest is forgotten first


class Send(Protocol):
    def __call__(
        self, name: str, trace: TraceContext, start: float, end: float, attributes: Attributes
    ) -> None: ...


@dataclass(slots=True)
class _Followed:
    request_id: str
    trace: TraceContext
    attempt: int
    stage: str = ""
    since: float = 0.0


class RequestSpans:
    """Times are seconds of the machine's monotonic clock."""

    def __init__(self, send: Send, clock: Callable[[], float] = time.monotonic) -> None:
        self._send, self._clock = send, clock
        self._followed: dict[str, _Followed] = {}  # oldest first

    def follow(self, request_id: str, attempt: int, trace: TraceContext) -> None:
        known = self._followed.get(request_id)
        if known is not None and known.attempt >= attempt:
            return
        self._followed.pop(request_id, None)
        self._followed[request_id] = _Followed(request_id, trace, attempt)
        if len(self._followed) > MAX_FOLLOWED:
            del self._followed[next(iter(self._followed))]

    def add(self, name: str, request_ids: Iterable[str], start: float, end: float, amount: int) -> None:
        """A piece of work, which is a span of each request that it was done for."""
        for request_id in request_ids:
            if (followed := self._followed.get(request_id)) is not None:
                self._tell(followed, name, start, end, {"vlm.amount": amount} if amount else {})

    def enter(
        self, request_id: str, stage: str, behind: str = "", attributes: Attributes | None = None
    ) -> None:
        """The request goes on from the stage `behind` to another; from no other stage does it. `attributes`
        are of the stage that it leaves."""
        followed = self._followed.get(request_id)
        if followed is None or followed.stage != behind:
            return
        now = self._clock()
        if behind:
            self._tell(followed, behind, followed.since, now, attributes or {})
        followed.stage, followed.since = stage, now

    def end(self, request_id: str, attributes: Attributes) -> None:
        """The request leaves its last stage, and is forgotten."""
        followed = self._followed.pop(request_id, None)
        if followed is not None and followed.stage:
            self._tell(followed, followed.stage, followed.since, self._clock(), attributes)

    def _tell(self, followed: _Followed, name: str, start: float, end: float, attributes: Attributes) -> None:
        told: Attributes = {
            "vlm.request_id": followed.request_id,
            "vlm.attempt": followed.attempt,
            **attributes,
        }
        self._send(name, followed.trace, start, end, told)
