"""POST /v1/chat/completions.

Unserved fields that would change the answer are refused by name, never ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, assert_never

import msgspec

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.prompts import ChatMessage, Part
from pipeline.wire.sampling import MAX_LOGPROBS, SamplingParams
from workers.api.answer import Answer, ChoiceAnswer, ScoredToken, TokenScores, Update
from workers.api.endpoints.base import Endpoint, Json, ServedModel
from workers.api.endpoints.openai import usage_object
from workers.api.json_bodies import decode_json
from pipeline.parsers.base import Content, ParserEvent, Thought
from workers.api.parts import check_counts, to_part
from workers.api.request_fields import check_request
from workers.api.sampling_fields import SamplingFields, check_max_tokens, to_sampling
from workers.api.server_sent_events import DONE, event
from workers.api.submission import Submission, without_data_urls


class RequestMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[dict[str, Any]] | None = None  # its parts: see parts.py
    name: str | None = None  # ignored: no chat template of the family uses it
    # OpenAI's client sends these back from an earlier answer; only empty values are accepted.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: Any = None
    function_call: Any = None
    tool_calls: list[Any] | None = None


class ChatCompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    messages: list[RequestMessage]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Known to OpenAI's or vLLM's API and not served: only values that change nothing are accepted.
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


def decode_request(body: bytes | bytearray) -> ChatCompletionRequest:
    """Raises RequestError, naming the field, for a body that is no chat completion request."""
    request = decode_json(body, ChatCompletionRequest)
    check_counts([message.content for message in request.messages])
    return request


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


def to_messages(request: ChatCompletionRequest) -> list[ChatMessage]:
    """The pipeline's messages. OpenAI's newer role name `developer` becomes `system`, which models know."""
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
    return to_sampling(
        request,
        defaults,
        max_tokens=(
            request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        ),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


class ChatCompletions(Endpoint):
    path = "/v1/chat/completions"

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._has_logprobs = self._includes_usage = False

    def decode(self, body: bytes | bytearray) -> Submission:
        request = decode_request(body)
        refuse_unserved(request)
        check_request(request, self.model.name)
        messages, sampling = to_messages(request), to_chat_sampling(request, self.model.info.default_sampling)
        conversation = without_data_urls(messages)
        self._has_logprobs, self._includes_usage = bool(request.logprobs), request.includes_usage
        return Submission(
            request_id=self._id,
            prompt=conversation.chat,
            media=conversation.media,
            sampling=sampling,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            is_streamed=request.stream,
        )

    def render(self, answer: Answer) -> Json:
        choices = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _logprobs(choice.logprobs) if self._has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(answer.choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage_object(answer.usage)}

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """Each choice's role, its text as it comes and its finish reason; then the usage if requested."""
        for index in range(len(answer.choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for update in updates:
            for chunk in self._chunks(update):
                yield chunk
        if self._includes_usage:
            usage = usage_object(answer.usage)
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield DONE

    def _chunks(self, update: Update) -> Iterator[bytes]:
        logprobs: Sequence[TokenScores] = update.logprobs
        deltas = [_delta(one) for one in update.events]
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._chunk(update.choice, delta, logprobs=logprobs)
            logprobs = ()  # only the first delta carries them
        if update.finish_reason is not None:
            yield self._chunk(update.choice, {}, update.finish_reason)

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model.name}

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None = None,
        logprobs: Sequence[TokenScores] = (),
    ) -> bytes:
        shown = _logprobs(logprobs) if self._has_logprobs and logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})


def _message(choice: ChoiceAnswer) -> Json:
    message: Json = {"role": "assistant", "content": "".join(choice.content), "refusal": None}
    if choice.thoughts:
        message["reasoning_content"] = "".join(choice.thoughts)
    return message


def _delta(parsed: ParserEvent) -> dict[str, str]:
    match parsed:
        case Content(text):
            return {"content": text}
        case Thought(text):
            return {"reasoning_content": text}
        case _:
            assert_never(parsed)


def _logprobs(tokens: Sequence[TokenScores]) -> Json:
    """OpenAI's entries, one for each token."""
    entries = [
        {**_entry(token.chosen), "top_logprobs": [_entry(one) for one in token.best]} for token in tokens
    ]
    return {"content": entries, "refusal": None}


def _entry(token: ScoredToken) -> Json:
    # JSON has no infinity; OpenAI writes the smallest logprob as -9999.
    return {
        "token": token.text.decode(errors="replace"),
        "logprob": max(token.logprob, -9999.0),
        "bytes": list(token.text),
    }


ROUTES = (ChatCompletions,)
