"""Server-sent events of one chat completion."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec

from pipeline.client import Piece
from pipeline.errors import ErrorInfo
from workers.api.protocol import error_body, usage

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Completion:
    """What every chunk of one answer repeats."""

    completion_id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, **parts: object) -> bytes:
        head = {"id": self.completion_id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return event({**head, **parts})

    def delta(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        return self.chunk(choices=[{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def whole(self, text: str, last: Piece) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return {
            "id": self.completion_id, "object": "chat.completion", "created": self.created, "model": self.model, "choices": [choice],
            "usage": usage(last.num_prompt_tokens, last.num_output_tokens),
        }  # fmt: skip


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_event(error: ErrorInfo) -> bytes:
    return event(error_body(error))


async def events(completion: Completion, first: Piece, rest: AsyncIterator[Piece], include_usage: bool) -> AsyncIterator[bytes]:
    """The answer as events: the role, the text as it comes, the finish reason, the usage if wanted, and the end mark."""
    yield completion.delta({"role": "assistant", "content": ""})
    piece = first
    while True:
        if piece.text:
            yield completion.delta({"content": piece.text})
        if piece.finish_reason is not None:
            break
        piece = await anext(rest)
    yield completion.delta({}, piece.finish_reason)
    if include_usage:
        yield completion.chunk(choices=[], usage=usage(piece.num_prompt_tokens, piece.num_output_tokens))
    yield DONE
