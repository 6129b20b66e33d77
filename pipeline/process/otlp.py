"""Spans for OpenTelemetry, sent to a collector over OTLP/HTTP by a thread of the SDK. Knows no request.

A collector that is slow or away never delays anything: what waits is bounded, what does not fit is dropped
and counted.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pipeline.wire.trace_context import MAX_TRACESTATE, TraceContext

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)
PACKAGES = ("opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
INSTALL = "pip install 'vlm-pipeline[otel]'"
SERVICE = "vlm-pipeline"
MAX_WAITING = 2048  # spans; more are dropped
FLUSH_S = 1.0  # at the end of a process
Attributes = Mapping[str, str | int | float | Sequence[str]]


def check_available(endpoint: str) -> None:
    """Raises ValueError when spans are to be sent and the packages for it are missing."""
    try:
        is_there = all(importlib.util.find_spec(name) is not None for name in PACKAGES)
    except ModuleNotFoundError:  # of a parent package
        is_there = False
    if endpoint and not is_there:
        raise ValueError(f"otlp_traces_endpoint needs OpenTelemetry's packages: {INSTALL}")


class OpenSpan(NamedTuple):
    """A span that lasts. `context`: the place of spans within it; None if it is not sampled."""

    span: Span
    context: TraceContext | None


class OtlpSpans:
    """The sender of one process. The environment's OTEL_* variables count, but for the size of the queue."""

    def __init__(self, endpoint: str, instance: str) -> None:
        # Here: the packages are optional, and take a third of a second to import.
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        ours = self
        exporter = OTLPSpanExporter(endpoint=endpoint)

        class Counting(SpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                result = exporter.export(spans)
                ours._on_sent(len(spans), result is SpanExportResult.SUCCESS)
                return result

        self._processor = BatchSpanProcessor(Counting(), max_queue_size=MAX_WAITING)

        class Bounded(SpanProcessor):
            def on_end(self, span: ReadableSpan) -> None:
                if ours._has_room():
                    ours._processor.on_end(span)

        resource = Resource.create()  # as the environment says
        named = {"service.instance.id": instance}
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            named["service.name"] = SERVICE
        provider = TracerProvider(resource=resource.merge(Resource(named)), shutdown_on_exit=False)
        provider.add_span_processor(Bounded())
        self._tracer = provider.get_tracer(SERVICE)
        self._propagator, self._server_kind = TraceContextTextMapPropagator(), SpanKind.SERVER
        self._within = set_span_in_context
        self._endpoint, self._is_away = endpoint, False
        self._lock = threading.Lock()  # of the counts: spans end on other threads than the sender's
        self._num_waiting = 0
        self.num_dropped = 0
        # The exporter writes a line for each batch that it cannot send; here one line says it.
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)
        # From the machine's monotonic clock to nanoseconds of the epoch.
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    def _has_room(self) -> bool:
        with self._lock:
            has_room = self._num_waiting < MAX_WAITING
            self._num_waiting += has_room
            self.num_dropped += not has_room
        return has_room

    def _on_sent(self, count: int, has_arrived: bool) -> None:
        with self._lock:
            self._num_waiting -= count
            self.num_dropped += 0 if has_arrived else count
        if self._is_away == has_arrived:
            self._is_away = not has_arrived
            what = "they arrive again" if has_arrived else "they are dropped until it takes them"
            logger.warning("spans for %s: %s", self._endpoint, what)

    def send(self, name: str, trace: TraceContext, start: float, end: float, attributes: Attributes) -> None:
        """A span that is over. Times are seconds of the machine's monotonic clock."""
        span = self._tracer.start_span(
            name, context=self._context(trace), start_time=self._ns(start), attributes=dict(attributes)
        )
        span.end(end_time=self._ns(end))

    def begin(self, name: str, trace: TraceContext | None, attributes: Attributes) -> OpenSpan:
        """A server's span, which begins now: in the client's trace, else in a new one."""
        span = self._tracer.start_span(
            name,
            context=None if trace is None else self._context(trace),
            kind=self._server_kind,
            attributes=dict(attributes),
        )
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._within(span))
        if not span.is_recording() or "traceparent" not in carrier:
            return OpenSpan(span, None)
        state = carrier.get("tracestate", "")
        return OpenSpan(
            span, TraceContext(carrier["traceparent"], state if len(state) <= MAX_TRACESTATE else "")
        )

    def is_valid(self, trace: TraceContext) -> bool:
        """Whether it names a trace whose spans are to be sent."""
        from opentelemetry.trace import get_current_span

        context = get_current_span(self._context(trace)).get_span_context()
        return context.is_valid and context.trace_flags.sampled

    def _context(self, trace: TraceContext) -> Context:
        return self._propagator.extract({"traceparent": trace.traceparent, "tracestate": trace.tracestate})

    def flush(self) -> None:
        """Waits for at most `FLUSH_S`."""
        thread = threading.Thread(target=self._processor.force_flush, daemon=True)
        thread.start()
        thread.join(FLUSH_S)

    def _ns(self, seconds: float) -> int:
        return self._epoch_ns + int(seconds * 1e9)
