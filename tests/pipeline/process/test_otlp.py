from __future__ import annotations

import importlib.util
import threading
import time
from importlib.machinery import ModuleSpec

import msgspec
import pytest

from pipeline.config import LauncherConfig
from pipeline.process.otlp import MAX_WAITING, OtlpSpans, check_available
from pipeline.process.trace import Tracer, tracer_of
from pipeline.wire.clients import IngestMessage, SubmitRequest
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Text
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role, WorkerId
from pipeline.wire.trace_context import TraceContext
from tests.collector import collecting

TRACE = TraceContext("00-" + "1" * 32 + "-" + "2" * 16 + "-01", "vendor=1")
REQUEST = SubmitRequest(
    client_id=bytes(16), request_id="r", attempt=1, prompt=Text("Hi"), sampling=SamplingParams()
)


def test_without_a_trace_there_is_no_field_on_the_wire() -> None:
    assert b"trace" not in msgspec.msgpack.encode(REQUEST)
    traced = msgspec.structs.replace(REQUEST, trace=TRACE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(traced), type=IngestMessage) == traced


def test_a_trace_context_that_is_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="too long"):
        TraceContext("0" * 65)
    with pytest.raises(RequestError, match="too long"):
        TraceContext(TRACE.traceparent, "s" * 513)


def test_without_its_packages_the_option_is_refused_with_the_command_that_installs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.startswith("opentelemetry") else find(name, package)

    check_available("http://127.0.0.1:4318/v1/traces")
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    check_available("")
    with pytest.raises(ValueError, match=r"pip install 'vlm-pipeline\[otel\]'"):
        check_available("http://127.0.0.1:4318/v1/traces")


def test_the_option_takes_a_url_of_http() -> None:
    with pytest.raises(ValueError, match="otlp_traces_endpoint 'grpc://h' must be a URL"):
        LauncherConfig(otlp_traces_endpoint="grpc://h")


def test_without_the_option_nothing_is_followed() -> None:
    tracer = tracer_of(LauncherConfig(), WorkerId(Role.LLM))
    tracer.follow("r", 1, TRACE)
    assert tracer.requests is None


@pytest.mark.parametrize(
    "traceparent",
    ["", "garbage", "00-" + "0" * 32 + "-" + "2" * 16 + "-01", TRACE.traceparent.removesuffix("01") + "00"],
)
def test_an_invalid_trace_and_one_that_is_not_sampled_are_not_followed(traceparent: str) -> None:
    with collecting() as collector:
        tracer = Tracer("", WorkerId(Role.VIT), OtlpSpans(collector.url, "vit.0"))
        tracer.follow("bad", 1, TraceContext(traceparent))
        tracer.follow("good", 1, TRACE)
        tracer.span("encode", time.monotonic(), ["bad", "good"])
        tracer.flush()
        (span,) = collector.spans
    assert (span.trace_id, span.parent_id, span.worker) == ("1" * 32, "2" * 16, "vit.0")


def test_what_a_collector_does_not_take_in_time_is_dropped_and_counted_and_delays_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    is_open = threading.Event()
    with collecting() as collector:
        spans = OtlpSpans(collector.url, "llm.0")
        send = spans._processor.span_exporter.export
        monkeypatch.setattr(
            spans._processor.span_exporter, "export", lambda batch: is_open.wait(60) and send(batch)
        )
        began = time.monotonic()
        for _ in range(MAX_WAITING + 700):
            spans.send("decode", TRACE, 0.0, 1.0, {})
        assert time.monotonic() - began < 50, "a span waited for the collector"
        assert spans.num_dropped == 700
        is_open.set()
        spans.flush()
        assert len(collector.spans) == MAX_WAITING
        assert spans.num_dropped == 700
        collector.status = 400
        spans.send("decode", TRACE, 0.0, 1.0, {})
        spans.flush()
        assert spans.num_dropped == 701
