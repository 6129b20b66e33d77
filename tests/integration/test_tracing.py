"""Spans of requests at a collector, from real processes; and metrics by API key."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest

from pipeline.client.blocking import BlockingClient
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.trace_context import TraceContext
from tests.collector import Collector, Span, collecting
from tests.integration.conftest import LIMITS
from tests.pictures import data_url, encode, scene
from tests.servers import Server
from tools.processes import workers_of

STAGES = {
    "prepare": "preprocess.0", "fetch": "preprocess.0", "tokenise": "preprocess.0",
    "decode picture": "preprocess.0", "encode": "vit.0",
    "queue": "llm.0", "prefill": "llm.0", "decode": "llm.0",
}  # fmt: skip
ROOT = "POST /v1/chat/completions"
REQUEST_ID = "http.response.header.x-request-id"
KEY = "sk-secret-of-ops"


class Traced(NamedTuple):
    server: Server
    collector: Collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"ops:{KEY}\nidle:sk-another-secret\n")
    keys.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch, collecting() as collector:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
        options = ("--otlp-traces-endpoint", collector.url, "--api-key-file", str(keys))
        with Server("--dtype", "float32", *options, *LIMITS) as server:
            yield Traced(server, collector)


def ask(server: Server, number: int, *headers: tuple[str, str], **fields: Any) -> dict[str, str]:
    """Asks about a picture; the answer's headers."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(scene(number))}},
        {"type": "text", "text": "What is it?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8, **fields}
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode())
    for name, value in (
        ("Content-Type", "application/json"), ("Authorization", f"Bearer {KEY}"), *headers
    ):  # fmt: skip
        request.add_header(name, value)
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()
        return {name.lower(): value for name, value in response.headers.items()}


def metrics(server: Server) -> str:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=20) as response:
        found: str = response.read().decode()
    return found


def parent_of(number: int) -> tuple[str, str, TraceContext]:
    trace_id, span_id = f"{number:032x}", f"{number:016x}"
    return trace_id, span_id, TraceContext(f"00-{trace_id}-{span_id}-01", "vendor=1")


def of_name(spans: list[Span], name: str) -> Span:
    (found,) = (one for one in spans if one.name == name)
    return found


def test_a_request_with_a_picture_is_one_trace_over_all_stages(traced: Traced) -> None:
    headers = ask(traced.server, 1, ("X-Request-Id", "mine-1"))
    assert headers["x-request-id"] == "mine-1"
    found = traced.collector.wait_until(lambda one: one.attributes.get(REQUEST_ID) == ["mine-1"])
    spans = traced.collector.wait_for(found.trace_id, ROOT, *STAGES)
    root = of_name(spans, ROOT)
    assert root.parent_id == ""
    assert root.service == "vlm-pipeline"
    asked = root.attributes
    assert asked["gen_ai.response.finish_reasons"] in (["length"], ["stop"])
    assert asked["gen_ai.usage.output_tokens"] in range(1, 9)
    assert asked["gen_ai.request.max_tokens"] == 8
    assert asked["http.response.status_code"] == 200
    assert asked["http.response.header.x-request-id"] == ["mine-1"]
    assert asked["vlm.api_key.name"] == "ops"
    assert KEY not in json.dumps(asked)
    assert {one.name: one.worker for one in spans} == {ROOT: "api.0", **STAGES}
    for span in spans:
        if span is not root:
            assert span.parent_id == root.span_id
            assert span.attributes["vlm.attempt"] == 1
            assert span.attributes["vlm.request_id"] == asked["gen_ai.response.id"]
            assert root.start - 10**7 <= span.start <= span.end <= root.end + 10**7
    order = ("prepare", "queue", "prefill", "decode")
    starts = [of_name(spans, name).start for name in order]
    assert starts == sorted(starts)
    assert of_name(spans, "queue").end == of_name(spans, "prefill").start
    assert of_name(spans, "prefill").end == of_name(spans, "decode").start
    tokens = of_name(spans, "prefill").attributes["gen_ai.usage.input_tokens"]
    assert tokens == asked["gen_ai.usage.input_tokens"] > 0
    told = of_name(spans, "decode").attributes
    assert told["gen_ai.usage.output_tokens"] == asked["gen_ai.usage.output_tokens"]


def test_a_callers_trace_is_gone_on_with_and_one_that_is_not_sampled_is_not_sent(traced: Traced) -> None:
    unsampled = parent_of(77)[2].traceparent.removesuffix("01") + "00"
    ask(traced.server, 2, ("traceparent", unsampled))
    trace_id, span_id, context = parent_of(2)
    given = ("traceparent", context.traceparent), ("tracestate", context.tracestate)
    ask(traced.server, 2, *given, stream=True)
    spans = traced.collector.wait_for(trace_id, ROOT, *STAGES.keys() - {"decode picture", "encode"})
    assert of_name(spans, ROOT).parent_id == span_id
    assert {one.parent_id for one in spans if one.name != ROOT} == {of_name(spans, ROOT).span_id}
    assert traced.collector.of_trace(parent_of(77)[0]) == []


def test_a_client_without_http_has_its_own_trace(traced: Traced) -> None:
    trace_id, span_id, context = parent_of(3)
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    num_before = len(traced.collector.spans)
    with BlockingClient(traced.server.run_dir) as client:
        list(client.generate(messages, sampling, [encode(scene(31))], "without-a-trace"))
        list(client.generate(messages, sampling, [encode(scene(3))], trace_context=context))
    spans = traced.collector.wait_for(trace_id, *STAGES)
    assert {one.name: one.worker for one in spans} == STAGES
    assert {one.parent_id for one in spans} == {span_id}
    assert {one.trace_id for one in traced.collector.spans[num_before:]} == {trace_id}


def test_the_attempts_of_an_interrupted_request_show(traced: Traced) -> None:
    trace_id, _, context = parent_of(4)
    server = traced.server
    with ThreadPoolExecutor(1) as threads:
        given = ("traceparent", context.traceparent)
        asked = threads.submit(ask, server, 4, given, max_tokens=200, ignore_eos=True)
        traced.collector.wait_for(trace_id, "encode")
        os.kill(workers_of(server.process.pid)["llm.0"], signal.SIGKILL)
        asked.result()
    spans = traced.collector.wait_for(trace_id, ROOT, "decode")
    server.children = workers_of(server.process.pid)
    attempts = {name: [one.attributes["vlm.attempt"] for one in spans if one.name == name] for name in STAGES}
    assert attempts["prepare"] == [1, 2]
    assert attempts["decode"] == [2]  # the first attempt's had not ended when the LLM died
    (event,) = of_name(spans, ROOT).events
    assert event.name == "interrupted"
    assert event.attributes == {"vlm.attempt": 1, "vlm.reason": "llm.0 died"}
    assert not of_name(spans, ROOT).has_error


def test_a_collector_that_is_away_delays_nothing_and_what_it_misses_is_counted(traced: Traced) -> None:
    traced.collector.status = 400  # not to be tried again
    try:
        trace_id, _, context = parent_of(5)
        ask(traced.server, 5, ("traceparent", context.traceparent))
        end = time.monotonic() + 20
        while not re.search(r'vlm_dropped_spans_total\{worker="llm.0"\} [1-9]', metrics(traced.server)):
            assert time.monotonic() < end
            time.sleep(0.2)
        assert traced.collector.of_trace(trace_id) == []
    finally:
        traced.collector.status = 200
