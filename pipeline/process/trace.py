"""Traces of a worker's pieces of work: for `tools/trace.py` a line each in the worker's file, for
OpenTelemetry spans of each request."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pipeline.config import LauncherConfig
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
    def __init__(self, folder: str, worker: WorkerId, otlp: OtlpSpans | None = None) -> None:
        """Without a folder nothing is written, without `otlp` nothing is sent."""
        self.otlp = otlp
        # None: no request is followed, and nothing is to be done for it.
        self.requests = None if otlp is None else RequestSpans(otlp.send)
        self._file = (Path(folder) / f"{worker}.jsonl").open("ab") if folder else None
        self._written_at = 0.0

    @property
    def is_on(self) -> bool:
        return self._file is not None

    def follow(self, request_id: str, attempt: int, trace: Trace) -> None:
        """From now on pieces of work for the request are spans in its client's trace."""
        if self.otlp is None or self.requests is None or not isinstance(trace, TraceContext):
            return
        if self.otlp.is_valid(trace):
            self.requests.follow(request_id, attempt, trace)

    def span(
        self, name: str, start: float, request_ids: Iterable[str], amount: int = 0, end: float | None = None
    ) -> None:
        """A piece of work that ends now, if no other end is given."""
        if self._file is None and self.requests is None:
            return
        now = time.monotonic()
        span = TraceSpan(name, start, now if end is None else end, tuple(dict.fromkeys(request_ids)), amount)
        if self.requests is not None:
            self.requests.add(name, span.request_ids, start, span.end, amount)
        self._write(span, now)

    def step(self, name: str, start: float, request_ids: Iterable[str], amount: int, end: float) -> None:
        """A step of the LLM. A request has too many to be spans of its own."""
        if self._file is not None:
            self._write(TraceSpan(name, start, end, tuple(dict.fromkeys(request_ids)), amount), end)

    def _write(self, span: TraceSpan, now: float) -> None:
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


def tracer_of(config: LauncherConfig, worker: WorkerId) -> Tracer:
    endpoint = config.otlp_traces_endpoint
    return Tracer(config.trace_dir, worker, OtlpSpans(endpoint, str(worker)) if endpoint else None)
