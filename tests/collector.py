"""A collector of OpenTelemetry's spans, in a thread of the test: OTLP over HTTP, as protobuf."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    name: str
    worker: str  # that sent it
    service: str
    trace_id: str
    span_id: str
    parent_id: str  # empty: it has none
    start: int  # nanoseconds of the epoch
    end: int
    has_error: bool
    attributes: dict[str, Any]
    events: tuple[Event, ...]


@dataclass
class Collector:
    status: int = 200  # of its answers
    url: str = ""
    spans: list[Span] = field(default_factory=list)

    def of_trace(self, trace_id: str) -> list[Span]:
        """By start."""
        return sorted((one for one in self.spans if one.trace_id == trace_id), key=lambda one: one.start)

    def wait_for(self, trace_id: str, *names: str, timeout_s: float = 20) -> list[Span]:
        """The spans of the trace, once all these names are there."""
        end = time.monotonic() + timeout_s
        while not set(names) <= {one.name for one in self.of_trace(trace_id)}:
            found = [(one.name, one.worker) for one in self.of_trace(trace_id)]
            assert time.monotonic() < end, f"of {names} there are only {found}"
            time.sleep(0.05)
        return self.of_trace(trace_id)

    def wait_until(self, is_meant: Callable[[Span], bool], timeout_s: float = 20) -> Span:
        """The first span that is meant, once it is there."""
        end = time.monotonic() + timeout_s
        while (found := next(filter(is_meant, self.spans), None)) is None:
            assert time.monotonic() < end, f"there are only {[one.name for one in self.spans]}"
            time.sleep(0.05)
        return found

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.status == 200:
            self.spans += _spans(ExportTraceServiceRequest.FromString(body))
        return web.Response(status=self.status)


def _spans(told: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in told.resource_spans:
        of_worker = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    span.name, of_worker["service.instance.id"], of_worker["service.name"],
                    span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                    span.start_time_unix_nano, span.end_time_unix_nano, span.status.code == 2,
                    _attributes(span.attributes),
                    tuple(Event(event.name, _attributes(event.attributes)) for event in span.events),
                )  # fmt: skip


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return (
        [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)
    )


@contextmanager
def collecting() -> Iterator[Collector]:
    collector, loop = Collector(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        application = web.Application()
        application.router.add_post("/v1/traces", collector.take)
        runner = web.AppRunner(application)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield collector
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
