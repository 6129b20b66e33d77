"""A running submission: one request to the pipeline, whose choices run concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from pipeline.client.client import Piece, PipelineClient
from pipeline.families import ModelInfo
from pipeline.wire.errors import RequestError
from workers.api.answer import Answer, Update
from pipeline.parsers.registry import parser_of
from workers.api.submission import Submission

MAX_UNREAD_PIECES = 8192  # of one HTTP request whose client reads too slowly


async def read_ahead(pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
    """Reads pieces as they come into a queue, and yields them. Leaving early ends the request.

    Raises RequestError when the queue exceeds `MAX_UNREAD_PIECES`.
    """
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def read() -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                queue.put_nowait(piece)
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


class Generation:
    """Used by HTTP endpoints and offline batches. Call either `updates` or `whole`, once."""

    def __init__(
        self,
        client: PipelineClient,
        submission: Submission,
        info: ModelInfo,
        cache_salt: bytes = b"",
        tenant: str = "",
    ) -> None:
        self._client, self._submission = client, submission
        self._cache_salt, self._tenant = cache_salt, tenant
        parser = parser_of(info, submission.prompt)
        self.answer = Answer(submission.sampling.n, parser, client.token_text)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """Updates as they come. Leaving early aborts the request. Raises RequestError."""
        submission = self._submission
        pieces = self._client.generate(
            submission.prompt,
            submission.sampling,
            submission.media,
            request_id=submission.request_id,
            priority=submission.priority,
            cache_salt=self._cache_salt,
            tenant=self._tenant,
        )
        async with aclosing(read_ahead(pieces)) as ahead:
            async for piece in ahead:
                yield self.answer.add(piece)

    async def whole(self) -> Answer:
        """The whole answer. Raises RequestError."""
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                self.answer.keep(update)
        return self.answer
