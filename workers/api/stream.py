"""A chat completion as OpenAI's objects: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np

from pipeline.client.client import Piece
from pipeline.wire.errors import ErrorInfo, RequestError
from pipeline.wire.messages import TokenLogprobs, unpack_int32
from pipeline.wire.sampling import FinishReason
from workers.api.protocol import error_body, usage

DONE = b"data: [DONE]\n\n"
MAX_UNREAD_PIECES = 8192  # of one HTTP request, whose client reads more slowly than they come
Json = dict[str, Any]


class ChoicePiece(NamedTuple):
    """A piece of one of the choices."""

    choice: int
    piece: Piece


async def read_ahead(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[ChoicePiece, None]:
    """The pieces as they come, however slowly they are taken. Leaving early ends the request.

    Raises RequestError when too many have come that were not taken.
    """
    queue: asyncio.Queue[ChoicePiece | BaseException | None] = asyncio.Queue()

    async def read() -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(ChoicePiece(piece.index, piece))
                if queue.qsize() > MAX_UNREAD_PIECES:
                    raise RequestError("the answer is not read as fast as it comes", status=503)

    def on_done(task: asyncio.Task[None]) -> None:
        queue.put_nowait(None if task.cancelled() else task.exception())

    task = asyncio.create_task(read())
    task.add_done_callback(on_done)
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(slots=True)
class _Choice:
    """One answer so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.finish_reason = piece.finish_reason
        self.num_prompt_tokens, self.num_output_tokens = piece.num_prompt_tokens, piece.num_output_tokens
        self.num_cached_tokens = piece.num_cached_tokens


class Completion:
    """One answer to an HTTP request. `token_text` gives a token's bytes."""

    def __init__(
        self,
        completion_id: str,
        model: str,
        num_choices: int,
        has_logprobs: bool,
        token_text: Callable[[int], bytes],
    ) -> None:
        self.completion_id, self._model, self._created = completion_id, model, int(time.time())
        self._choices = [_Choice() for _ in range(num_choices)]
        self._has_logprobs, self._token_text = has_logprobs, token_text

    def _head(self, kind: str) -> Json:
        return {"id": self.completion_id, "object": kind, "created": self._created, "model": self._model}

    def _usage(self) -> dict[str, object]:
        """The prompt counts once, however many choices there are."""
        first = self._choices[0]
        return usage(
            first.num_prompt_tokens,
            sum(choice.num_output_tokens for choice in self._choices),
            first.num_cached_tokens,
        )

    def _to_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> list[Json]:
        """OpenAI's entries, one for each token."""
        entries: list[Json] = []
        for token in logprobs:
            values: list[float] = np.frombuffer(token.logprobs, dtype="<f4").tolist()
            chosen, *best = [
                self._entry(*pair)
                for pair in zip(unpack_int32(token.token_ids).tolist(), values, strict=True)
            ]
            entries.append({**chosen, "top_logprobs": best})
        return entries

    def _entry(self, token_id: int, logprob: float) -> Json:
        text = self._token_text(token_id)
        # JSON has no infinity; OpenAI writes the smallest logprob as -9999.
        return {"token": text.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(text)}

    async def whole(self, pieces: AsyncIterator[ChoicePiece]) -> Json:
        async for index, piece in pieces:
            choice = self._choices[index]
            choice.add(piece)
            choice.texts.append(piece.text)
            choice.logprobs += self._to_logprobs(piece.logprobs)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._has_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]  # fmt: skip
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    async def events(
        self, first: ChoicePiece, rest: AsyncIterator[ChoicePiece], include_usage: bool
    ) -> AsyncIterator[bytes]:
        """Of each choice the role, the text as it comes and the finish reason; then the usage if wanted, and
        the end mark."""
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for index, piece in _chain(first, rest):
            self._choices[index].add(piece)
            if piece.text or piece.logprobs:
                yield self._chunk(index, {"content": piece.text}, logprobs=self._to_logprobs(piece.logprobs))
            if piece.finish_reason is not None:
                yield self._chunk(index, {}, piece.finish_reason)
        if include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish_reason: str | None = None,
        logprobs: Sequence[Json] = (),
    ) -> bytes:
        shown = {"content": logprobs, "refusal": None} if self._has_logprobs and logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})


async def _chain(first: ChoicePiece, rest: AsyncIterator[ChoicePiece]) -> AsyncIterator[ChoicePiece]:
    yield first
    async for item in rest:
        yield item


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def error_event(error: ErrorInfo) -> bytes:
    return event(error_body(error))
