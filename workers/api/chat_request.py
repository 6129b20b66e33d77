"""The fields of a chat request, and their conversion to the pipeline's chat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from pipeline.parsers.forms import THINKING, ChatForms
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.limits import MAX_TOOL_CALLS
from pipeline.wire.prompts import (
    MAX_TEMPLATE_OPTION,
    TEMPLATE_OPTIONS,
    ChatMessage,
    Part,
    TemplateOption,
    ToolCall,
)
from pipeline.wire.sampling import MAX_LOGPROBS, SamplingParams
from workers.api.parts import check_counts, to_part
from workers.api.sampling_fields import SamplingFields, check_max_tokens, to_sampling

# How much a model shall think. Most models can only be told whether to.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
THOUGHTLESS = ("none", "minimal")


class RequestFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = ""


class RequestCall(msgspec.Struct):
    function: RequestFunction
    id: str = ""
    type: str = "function"


class RequestMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]] | None = None  # its parts: see parts.py
    name: str | None = None
    tool_calls: list[RequestCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, by its newer name
    # OpenAI's client sends these back from an earlier answer; only empty values are accepted.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None


class ChatCompletionRequest(SamplingFields, kw_only=True):
    messages: list[RequestMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Any = None
    reasoning: Any = None  # an object with the effort
    include_reasoning: bool = True
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    thinking_budget: int | None = None  # the same, by its other name
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    # What came before tools: only values that change nothing are accepted.
    functions: list[Any] | None = None
    function_call: Any = None


NEUTRAL: Mapping[str, tuple[object, ...]] = {"functions": ([],), "function_call": ("none", "auto")}
NEUTRAL_IN_MESSAGE = ("refusal", "annotations", "audio", "function_call")


def check_chat(request: ChatCompletionRequest) -> None:
    """Raises RequestError, naming the field, for what is not served and would change the answer."""
    check_counts([message.content for message in request.messages])
    num_calls = sum(len(message.tool_calls or ()) for message in request.messages)
    if num_calls > MAX_TOOL_CALLS:
        what = f"the messages have {num_calls} calls, the limit is {MAX_TOOL_CALLS}"
        raise RequestError(what, field="messages")
    for field, neutral in NEUTRAL.items():
        value = getattr(request, field)
        if value is not None and value not in neutral:
            what = f"{field} is not served by this server, use tools; got {shown(value)}"
            raise RequestError(what, field=field)
    for index, message in enumerate(request.messages):
        for field in NEUTRAL_IN_MESSAGE:
            if getattr(message, field):
                what = f"{field} in a message is not served by this server"
                raise RequestError(what, field=f"messages[{index}].{field}")
    if request.continue_final_message and request.add_generation_prompt:
        what = "continue_final_message needs add_generation_prompt to be false"
        raise RequestError(what, field="continue_final_message")


def to_messages(request: ChatCompletionRequest) -> list[ChatMessage]:
    """The pipeline's messages. OpenAI's newer role name `developer` becomes `system`, which models know."""
    return [_to_message(message, f"messages[{index}]") for index, message in enumerate(request.messages)]


def _to_message(message: RequestMessage, field: str) -> ChatMessage:
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    return ChatMessage(
        "system" if message.role == "developer" else message.role,
        _to_content(message.content, field),
        tool_calls=tuple(map(_to_call, message.tool_calls or ())),
        tool_call_id=message.tool_call_id or "",
        name=message.name or "",
        reasoning=reasoning,
    )


def _to_call(call: RequestCall) -> ToolCall:
    arguments = call.function.arguments
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(call.id, call.function.name, text)


def _to_content(content: str | list[dict[str, Any]] | None, field: str) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    return tuple(to_part(part, f"{field}.content[{number}]") for number, part in enumerate(content))


def to_template_options(request: ChatCompletionRequest, forms: ChatForms) -> dict[str, TemplateOption]:
    """Raises RequestError for an option that no template shall be told, and for an unknown effort."""
    options: dict[str, TemplateOption] = {}
    for name, value in (request.chat_template_kwargs or {}).items():
        field = f"chat_template_kwargs.{name}"
        if name not in TEMPLATE_OPTIONS:
            what = f"{shown(name)} is no option of a chat template here: {', '.join(TEMPLATE_OPTIONS)}"
            raise RequestError(what, field=field)
        if value is not None and not isinstance(value, TemplateOption):
            raise RequestError(f"{name} must be a scalar, got {shown(value)}", field=field)
        if isinstance(value, str) and len(value) > MAX_TEMPLATE_OPTION:
            what = f"{name} has {len(value)} characters, the limit is {MAX_TEMPLATE_OPTION}"
            raise RequestError(what, field=field)
        if value is not None:
            options[name] = value
    for field in ("reasoning_effort", "reasoning"):
        if (effort := _effort(getattr(request, field), field)) is not None:
            if forms.knows(THINKING):
                options.setdefault(THINKING, effort not in THOUGHTLESS)
            if forms.knows("reasoning_effort"):
                options.setdefault("reasoning_effort", effort)
    return options


def _effort(given: Any, field: str) -> str | None:
    if isinstance(given, dict):
        given, field = given.get("effort"), f"{field}.effort"
    effort = given
    if effort is None or (isinstance(effort, str) and effort in EFFORTS):
        return effort
    known = ", ".join(EFFORTS)
    raise RequestError(f"{field} must be one of {known}, got {shown(effort)}", field=field)


def to_chat_sampling(request: ChatCompletionRequest, defaults: Mapping[str, float]) -> SamplingParams:
    """Raises RequestError for a value out of range."""
    check_max_tokens(request.max_tokens, "max_tokens")
    check_max_tokens(request.max_completion_tokens, "max_completion_tokens")
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {request.top_logprobs}",
            field="top_logprobs",
        )
    sampling = to_sampling(
        request,
        defaults,
        max_tokens=(
            request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        ),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    return msgspec.structs.replace(sampling, thinking_budget=_thinking_budget(request))


def _thinking_budget(request: ChatCompletionRequest) -> int | None:
    budget, field = request.thinking_token_budget, "thinking_token_budget"
    if budget is None:
        budget, field = request.thinking_budget, "thinking_budget"
    if budget is not None and not 0 <= budget < 2**31:
        raise RequestError(f"{field} must be 0 or more and fit 32 bits, got {shown(budget)}", field=field)
    return budget
