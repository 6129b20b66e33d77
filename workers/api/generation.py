"""A running submission: one request to the pipeline, whose choices run concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Protocol

from pipeline.client.client import Piece, PipelineClient
from pipeline.client.connection import MAX_UNREAD, TOO_SLOW
from pipeline.parsers.forms import ChatForms
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Prompt
from pipeline.wire.trace_context import TraceContext
from workers.api.answer import Answer, Update
from workers.api.submission import Submission

SOME_UNREAD = 64  # pieces, which may have come faster than they can be read
MAX_PROMPTS_AT_ONCE = 32  # of one HTTP request
Pieces = AsyncGenerator[tuple[int, Piece], None]  # each with the number of its prompt


class Trace(Protocol):
    """Of the HTTP request."""

    @property
    def context(self) -> TraceContext | None: ...

    def on_interrupted(self, attempt: int, reason: str) -> None: ...


async def read_ahead(sources: Sequence[Callable[[], Pieces]]) -> Pieces:
    """Reads the pieces of all sources as they come into a queue.

    Leaving early ends the requests. Raises RequestError when the queue exceeds `MAX_UNREAD`.
    """
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()
    waiting = iter(sources)

    async def read() -> None:
        for source in waiting:
            async with aclosing(source()) as pieces:
                async for piece in pieces:
                    queue.put_nowait(piece)
                    if queue.qsize() > SOME_UNREAD:
                        await asyncio.sleep(0)  # a repeated answer comes in one piece after the other
                    if queue.qsize() > MAX_UNREAD:
                        raise RequestError(TOO_SLOW, status=503)

    def on_done(task: asyncio.Task[None]) -> None:
        queue.put_nowait(None if task.cancelled() else task.exception())

    tasks = [asyncio.create_task(read()) for _ in range(min(len(sources), MAX_PROMPTS_AT_ONCE))]
    for task in tasks:
        task.add_done_callback(on_done)
    num_reading = len(tasks)
    try:
        while num_reading:
            item = await queue.get()
            if item is None:
                num_reading -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Generation:
    """Used by HTTP endpoints and offline batches. Call either `updates` or `whole`, once."""

    def __init__(
        self,
        client: PipelineClient,
        submission: Submission,
        forms: ChatForms,
        cache_salt: bytes = b"",
        tenant: str = "",
        trace: Trace | None = None,
        on_first_token: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._submission = client, submission
        self._cache_salt, self._tenant, self._trace = cache_salt, tenant, trace
        self._on_first_token = on_first_token
        makers = [forms.parser_maker(prompt) for prompt in submission.prompts]
        self.answer = Answer(
            submission.sampling.n,
            lambda number: makers[number](),
            client.token_text,
            len(makers),
        )

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Updates as they come. Leaving early aborts the request. Raises RequestError."""
        first, *more = [
            partial(self._pieces, number, prompt) for number, prompt in enumerate(self._submission.prompts)
        ]
        async with aclosing(read_ahead([first, *more]) if more else first()) as pieces:
            has_begun = False
            async for number, piece in pieces:
                if not has_begun:
                    has_begun = True
                    self._on_first_token()
                yield self.answer.add(piece, number)

    async def _pieces(self, number: int, prompt: Prompt) -> Pieces:
        submission, trace = self._submission, self._trace
        pieces = self._client.generate(
            prompt,
            submission.sampling,
            submission.media,
            request_id=submission.id_of(number),
            priority=submission.priority,
            cache_salt=self._cache_salt,
            adapter=submission.adapter,
            tenant=self._tenant,
            trace_context=None if trace is None else trace.context,
            on_interrupted=None if trace is None else trace.on_interrupted,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield number, piece

    async def whole(self) -> Answer:
        """The whole answer. Raises RequestError."""
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                self.answer.keep(update)
        return self.answer
