"""Traces of a worker's pieces of work: for `tools/trace.py` a line each in the worker's file, for
OpenTelemetry spans of each request, for the page's lanes a message now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pipeline.config import LauncherConfig
from pipeline.process.lanes import Lanes
from pipeline.process.otlp import OtlpSpans
from pipeline.process.request_spans import RequestSpans
from pipeline.wire.topology import WorkerId
from pipeline.wire.trace_context import Trace, TraceContext

FLUSH_S = 0.5


class TraceSpan(msgspec.Struct, frozen=True):
    """Times are seconds of the machine's monotonic clock, the same for all processes."""

    name: str
    start: float
    end: float
    request_ids: tuple[str, ...]
    amount: int = 0  # tokens or patches


class Tracer:
    def __init__(
        self, folder: str, worker: WorkerId, otlp: OtlpSpans | None = None, lanes: Lanes | None = None
    ) -> None:
        """Without a folder nothing is written, without `otlp` and `lanes` nothing is sent."""
        self.otlp, self._lanes = otlp, lanes
        # None: no request is followed, and nothing is to be done for it.
        self.requests = None if otlp is None else RequestSpans(otlp.send)
        self._file = (Path(folder) / f"{worker}.jsonl").open("ab") if folder else None
        self._written_at = 0.0

    @property
    def is_on(self) -> bool:
        """Whether steps are to be told."""
        return self._file is not None or self._is_watched

    @property
    def _is_watched(self) -> bool:
        return self._lanes is not None and self._lanes.is_watched

    def follow(self, request_id: str, attempt: int, trace: Trace) -> None:
        """From now on pieces of work for the request are spans in its client's trace."""
        if self.otlp is None or self.requests is None or not isinstance(trace, TraceContext):
            return
        if self.otlp.is_valid(trace):
            self.requests.follow(request_id, attempt, trace)

    def begin(self, name: str, request_ids: Iterable[str], amount: int = 0) -> None:
        """A long piece of work begins, and is shown by the lanes before its `span` comes."""
        if self._lanes is not None and self._lanes.is_watched:
            self._lanes.add(name, time.monotonic(), None, tuple(dict.fromkeys(request_ids)), amount)

    def span(
        self, name: str, start: float, request_ids: Iterable[str], amount: int = 0, end: float | None = None
    ) -> None:
        """A piece of work that ends now, if no other end is given."""
        if self.requests is None and not self.is_on:
            return
        now = time.monotonic()
        span = TraceSpan(name, start, now if end is None else end, tuple(dict.fromkeys(request_ids)), amount)
        if self.requests is not None:
            self.requests.add(name, span.request_ids, start, span.end, amount)
        self._tell(span, now, is_step=False)

    def step(self, name: str, start: float, request_ids: Iterable[str], amount: int, end: float) -> None:
        """A step of the LLM. A request has too many to be spans of its own."""
        if self.is_on:
            span = TraceSpan(name, start, end, tuple(dict.fromkeys(request_ids)), amount)
            self._tell(span, end, is_step=True)

    def _tell(self, span: TraceSpan, now: float, is_step: bool) -> None:
        if self._lanes is not None:
            self._lanes.add(span.name, span.start, span.end, span.request_ids, span.amount, is_step)
        if self._file is None:
            return
        self._file.write(msgspec.json.encode(span) + b"\n")
        if now - self._written_at > FLUSH_S:
            self._written_at = now
            self._file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
        if self.otlp is not None:
            self.otlp.flush()


def tracer_of(config: LauncherConfig, worker: WorkerId, lanes: Lanes | None = None) -> Tracer:
    endpoint = config.otlp_traces_endpoint
    return Tracer(config.trace_dir, worker, OtlpSpans(endpoint, str(worker)) if endpoint else None, lanes)
