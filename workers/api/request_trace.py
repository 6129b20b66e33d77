"""The span of one HTTP request to the model, with what OpenTelemetry's conventions for HTTP and for models
that generate text name. Never the contents of a request or an answer."""

from __future__ import annotations

from aiohttp import web

from pipeline.process.otlp import SERVICE, OpenSpan, OtlpSpans
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.trace_context import TraceContext
from workers.api.access_log import RequestRecord

OPERATIONS = {"/v1/completions": "text_completion"}  # of other routes: chat


class RequestTrace:
    """`end` it once."""

    def __init__(self, spans: OtlpSpans, request: web.Request, path: str, model: str) -> None:
        """`path`: the route's, without what the client wrote around it."""
        attributes = {
            "http.request.method": request.method,
            "http.route": path,
            "url.scheme": request.scheme,
            "gen_ai.operation.name": OPERATIONS.get(path, "chat"),
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
        }
        self._opened: OpenSpan = spans.begin(f"{request.method} {path}", _given(request), attributes)

    @property
    def context(self) -> TraceContext | None:
        """Of the pipeline's spans; None if the trace is not sampled."""
        return self._opened.context

    def on_interrupted(self, attempt: int, reason: str) -> None:
        """A worker died: the request is submitted again, with the next attempt."""
        told: dict[str, int | str] = {"vlm.attempt": attempt, "vlm.reason": reason}
        self._opened.span.add_event("interrupted", told)

    def asks(self, sampling: SamplingParams, is_streamed: bool) -> None:
        asked: dict[str, int | float | bool | None] = {
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": sampling.n,
            "gen_ai.request.stream": is_streamed,
        }
        for name, value in asked.items():
            if value is not None:
                self._opened.span.set_attribute(name, value)

    def end(self, record: RequestRecord) -> None:
        span = self._opened.span
        span.set_attribute("http.response.status_code", record.status)
        span.set_attribute("http.response.header.x-request-id", [record.request_id])
        for name, text in (
            ("vlm.api_key.name", record.key_name), ("gen_ai.response.id", record.completion_id)
        ):  # fmt: skip
            if text:
                span.set_attribute(name, text)
        if (answer := record.answer) is not None:
            usage = answer.usage
            span.set_attribute("gen_ai.usage.input_tokens", usage.num_prompt_tokens)
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.num_cached_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", usage.num_output_tokens)
            reasons = [str(choice.finish_reason) for choice in answer.choices if choice.finish_reason]
            if reasons:
                span.set_attribute("gen_ai.response.finish_reasons", reasons)
        if record.failed_status >= 500:
            from opentelemetry.trace import StatusCode  # there, where spans are

            span.set_status(StatusCode.ERROR)
        if record.failed_status:
            span.set_attribute("error.type", str(record.failed_status))
        span.end()


def _given(request: web.Request) -> TraceContext | None:
    """The place in the client's trace; None without one, or for one that is too long."""
    parent = request.headers.get("traceparent", "").strip()
    if not parent:
        return None
    state = ",".join(request.headers.getall("tracestate", []))
    try:
        return TraceContext(parent, state)
    except RequestError:
        return None
