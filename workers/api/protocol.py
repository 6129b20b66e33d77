"""OpenAI's chat completions as structs, and their conversion into the pipeline's own.

Fields that would change the answer and are not served are refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.wire.errors import ErrorInfo, RequestError, shown
from pipeline.wire.limits import MAX_MESSAGES, MAX_PARTS
from pipeline.wire.messages import ChatMessage, Part
from pipeline.wire.sampling import MAX_LOGIT_BIASES, MAX_LOGPROBS, SamplingParams
from workers.api.parts import to_part

# Signs that stand between values. More are refused before anything is made of them, which would stop the
# event loop. A text that has so many is longer than any context; pictures in base64 have none.
MAX_SIGNS = {b"{": 1 << 17, b"[": 1 << 17, b",": 1 << 18}
ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]] | None = None  # its parts: see parts.py
    name: str | None = None  # a label for people: no chat template of the family shows it
    # What OpenAI's client sends back of an earlier answer; only empty values are taken.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False


class ChatCompletionRequest(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[RequestMessage]
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None  # lower goes first
    cache_salt: str | None = None  # only requests with the same one share cached prefixes
    # These say nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Known to OpenAI's or vLLM's API and not served: only the value that changes nothing is taken.
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    response_format: Any = None
    modalities: list[str] | None = None


NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
NEUTRAL_IN_MESSAGE = ("refusal", "annotations", "audio", "function_call", "tool_calls")
_DECODER = msgspec.json.Decoder(ChatCompletionRequest, strict=True)


def decode_request(body: bytes | bytearray) -> ChatCompletionRequest:
    """Raises RequestError, naming the field, for a body that is no such request."""
    for sign, limit in MAX_SIGNS.items():
        if (count := body.count(sign)) > limit:
            raise RequestError(f"the body has {count} times {sign.decode()!r}, the limit is {limit}")
    try:
        try:
            request = _DECODER.decode(body)
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            # Python clients write NaN, Infinity and lone surrogates; so read, checks can name their field.
            request = msgspec.convert(json.loads(body), ChatCompletionRequest)
            _refuse_lone_surrogates(request)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        missing = re.search(r"(?:missing required|contains unknown) field `([^`]+)`", message)
        parts = [path.rstrip("`").removeprefix("$").removeprefix("."), missing.group(1) if missing else ""]
        field = ".".join(part for part in parts if part)
        raise RequestError(f"{message}{f' in {field}' if field else ''}", field=field) from None
    except (ValueError, RecursionError, OverflowError):
        raise RequestError("the body is not valid JSON, or nested too deep") from None
    _check_counts([one.content for one in request.messages])
    return request


def _check_counts(contents: Sequence[object]) -> None:
    if (count := len(contents)) > MAX_MESSAGES:
        raise RequestError(f"there are {count} messages, the limit is {MAX_MESSAGES}", field="messages")
    if (count := sum(len(content) for content in contents if isinstance(content, list))) > MAX_PARTS:
        raise RequestError(f"the messages have {count} parts, the limit is {MAX_PARTS}", field="messages")


def _refuse_lone_surrogates(request: ChatCompletionRequest) -> None:
    """Half a character, of a text that was cut in the middle: no encoder takes it."""
    fields = {name: getattr(request, name) for name in request.__struct_fields__ if name != "messages"}
    fields |= {f"messages[{index}]": message for index, message in enumerate(request.messages)}
    for field, value in fields.items():
        try:
            msgspec.json.encode(value)
        except UnicodeEncodeError:
            raise RequestError("half a character (a lone surrogate) is no text", field=field) from None


def refuse_unserved(request: ChatCompletionRequest) -> None:
    for field, neutral in NEUTRAL.items():
        value = getattr(request, field)
        if value is not None and value not in neutral:
            raise RequestError(f"{field} is not served by this server, got {shown(value)}", field=field)
    for index, message in enumerate(request.messages):
        for field in NEUTRAL_IN_MESSAGE:
            if getattr(message, field):
                raise RequestError(
                    f"{field} in a message is not served by this server", field=f"messages[{index}].{field}"
                )
    if request.priority is not None and not -(2**31) <= request.priority < 2**31:
        raise RequestError(f"priority must fit 32 bits, got {shown(request.priority)}", field="priority")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options need stream to be true", field="stream_options")


def to_messages(request: ChatCompletionRequest) -> list[ChatMessage]:
    """The pipeline's messages; `developer`, OpenAI's newer name for the system role, becomes what models
    know."""
    return [
        ChatMessage(
            "system" if message.role == "developer" else message.role, _to_content(message.content, index)
        )
        for index, message in enumerate(request.messages)
    ]


def _to_content(content: str | list[dict[str, Any]] | None, index: int) -> str | tuple[Part, ...]:
    if content is None or isinstance(content, str):
        return content or ""
    return tuple(to_part(part, f"messages[{index}].content[{number}]") for number, part in enumerate(content))


def to_sampling(request: ChatCompletionRequest, defaults: dict[str, float]) -> SamplingParams:
    """The request's sampling; what it leaves open is the model's own default.

    Raises RequestError out of range.
    """

    def pick(name: str, fallback: float) -> float:
        value = getattr(request, name)
        return defaults.get(name, fallback) if value is None else value

    for field in ("max_tokens", "max_completion_tokens"):
        if (limit := getattr(request, field)) is not None and not 1 <= limit < 2**31:
            raise RequestError(f"{field} must be at least 1 and fit 32 bits, got {shown(limit)}", field=field)
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", field="top_logprobs")
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= MAX_LOGPROBS:
        raise RequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {request.top_logprobs}",
            field="top_logprobs",
        )
    for field in ("logit_bias", "stop_token_ids"):
        if len(getattr(request, field) or ()) > MAX_LOGIT_BIASES:
            raise RequestError(f"{field} has more than {MAX_LOGIT_BIASES} entries", field=field)
    max_tokens = (
        request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    )
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    return SamplingParams(
        temperature=pick("temperature", 1.0), top_p=pick("top_p", 1.0), top_k=int(pick("top_k", 0)),
        min_p=pick("min_p", 0.0),
        presence_penalty=request.presence_penalty or 0.0, frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=pick("repetition_penalty", 1.0),
        logit_bias=_to_logit_bias(request.logit_bias or {}), seed=request.seed,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0, ignore_eos=request.ignore_eos, stop=stop,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        n=1 if request.n is None else request.n,
    )  # fmt: skip


def _to_logit_bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError(
            "logit_bias maps token ids, written as strings, to numbers", field="logit_bias"
        ) from None


def error_body(error: ErrorInfo) -> dict[str, object]:
    """OpenAI's error object."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {
        "error": {"message": error.message, "type": kind, "param": error.field or None, "code": error.status}
    }


def usage(num_prompt_tokens: int, num_output_tokens: int, num_cached_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }  # fmt: skip
