"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import ClassVar, assert_never

from pipeline.wire.errors import ErrorInfo
from pipeline.wire.sampling import FinishReason
from workers.api.answer import Answer, ChoiceAnswer, Update, Usage
from workers.api.anthropic_request import MessagesFields, MessagesRequest, to_call_input, to_chat_request
from workers.api.blocks import (
    AnswerBlock,
    AnswerBlocks,
    BlockEvent,
    BlockKind,
    Closed,
    Grown,
    Opened,
    blocks_of,
)
from workers.api.chat_submission import to_submission
from workers.api.description.answers import AnthropicAnswer, AnthropicError, TokenCount
from workers.api.endpoints.base import Endpoint, Json, ServedModel
from workers.api.sampling_fields import check_max_tokens
from workers.api.server_sent_events import event
from workers.api.submission import Submission, for_its_prompt

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class _Anthropic(Endpoint):
    error = AnthropicError
    field_names: ClassVar = {
        "response_format.json_schema": "output_config.format",
        "reasoning_effort": "output_config.effort",
        "thinking_token_budget": "thinking.budget_tokens",
        "stop": "stop_sequences",
    }

    @classmethod
    def error_body(cls, error: ErrorInfo) -> Json:
        error = cls.named(error)
        kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        message = f"{error.field}: {error.message}" if error.field else error.message
        return {"type": "error", "error": {"type": kind, "message": message}}

    @classmethod
    def last_words(cls, error: ErrorInfo) -> bytes:
        return _event(cls.error_body(error))


class Messages(_Anthropic):
    path, fields, answer = "/v1/messages", MessagesRequest, AnthropicAnswer

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id = f"msg_{uuid.uuid4().hex}"

    def decode(self, body: bytes | bytearray) -> Submission:
        request: MessagesRequest = self.read(body)
        self.choose_model(request.model)
        check_max_tokens(request.max_tokens, "max_tokens")
        return to_submission(to_chat_request(request, self.model.forms), self.model, self._id)

    def render(self, answer: Answer) -> Json:
        (choice,) = answer.choices
        blocks = blocks_of(choice)
        content = [_whole(block) for block in blocks]
        has_calls = any(block.kind is BlockKind.CALL for block in blocks)
        return self._message(content, answer.usage) | _end(choice, has_calls)

    def _message(self, content: list[Json], usage: Usage) -> Json:
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": self.model.name,
            "content": content, "stop_reason": None, "stop_sequence": None, "usage": _usage(usage),
        }  # fmt: skip

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """The message without content, its blocks one after another, and how it ended."""
        (choice,) = answer.choices
        blocks, has_begun = AnswerBlocks(), False
        async for update in updates:
            if not has_begun:
                started = self._message([], answer.usage._replace(num_output_tokens=0))
                yield _event({"type": "message_start", "message": started})
                yield _event({"type": "ping"})
                has_begun = True
            for one in blocks.add(update.events):
                for data in _block_events(one):
                    yield data
        for one in blocks.finish():
            for data in _block_events(one):
                yield data
        has_calls = any(block.kind is BlockKind.CALL for block in blocks.all)
        usage = _usage(answer.usage)
        yield _event({"type": "message_delta", "delta": _end(choice, has_calls), "usage": usage})
        yield _event({"type": "message_stop"})


class CountTokens(_Anthropic):
    path, fields, answer = "/v1/messages/count_tokens", MessagesFields, TokenCount
    streams = False

    def decode(self, body: bytes | bytearray) -> Submission:
        request: MessagesFields = self.read(body)
        self.choose_model(request.model)
        chat = to_chat_request(request, self.model.forms)
        return for_its_prompt(
            to_submission(chat, self.model, f"count-{uuid.uuid4().hex}"), self.model.max_model_len
        )

    def render(self, answer: Answer) -> Json:
        return {"input_tokens": len(answer.prompts[0].token_ids)}

    def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        raise AssertionError("a count is not streamed")


def _event(body: Json) -> bytes:
    return f"event: {body['type']}\n".encode() + event(body)


def _usage(usage: Usage) -> Json:
    """Anthropic counts tokens that a cache had apart from the others."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }


def _end(choice: ChoiceAnswer, has_calls: bool) -> Json:
    piece = choice.last_piece
    stop = piece.stop_reason if piece is not None else None
    match choice.finish_reason:
        case FinishReason.LENGTH:
            reason = "max_tokens"
        case FinishReason.STOP if isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        case _:
            reason = "tool_use" if has_calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": None}


def _whole(block: AnswerBlock) -> Json:
    match block.kind:
        case BlockKind.TEXT:
            return {"type": "text", "text": block.text}
        case BlockKind.THOUGHT:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case BlockKind.CALL:
            return {**_call(block), "input": to_call_input(block.text)}
        case _:
            assert_never(block.kind)


def _call(block: AnswerBlock) -> Json:
    return {"type": "tool_use", "id": f"toolu_{uuid.uuid4().hex}", "name": block.name, "input": {}}


def _block_events(one: BlockEvent) -> Iterator[bytes]:
    block = one.block
    match one:
        case Opened():
            empty = _call(block) if block.kind is BlockKind.CALL else _whole(block)
            yield _event({"type": "content_block_start", "index": block.index, "content_block": empty})
        case Grown(_, text):
            yield _delta(block, _growth(block.kind, text))
        case Closed():
            if block.kind is BlockKind.THOUGHT:
                yield _delta(block, {"type": "signature_delta", "signature": ""})
            yield _event({"type": "content_block_stop", "index": block.index})
        case _:
            assert_never(one)


def _growth(kind: BlockKind, text: str) -> Json:
    match kind:
        case BlockKind.TEXT:
            return {"type": "text_delta", "text": text}
        case BlockKind.THOUGHT:
            return {"type": "thinking_delta", "thinking": text}
        case BlockKind.CALL:
            return {"type": "input_json_delta", "partial_json": text}
        case _:
            assert_never(kind)


def _delta(block: AnswerBlock, delta: Json) -> bytes:
    return _event({"type": "content_block_delta", "index": block.index, "delta": delta})


ROUTES = (Messages, CountTokens)
