"""A submission under way: its choices run side by side, a request of the pipeline each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from pipeline.client.client import Piece, PipelineClient
from pipeline.families import ModelInfo
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import SamplingParams, with_seed
from workers.api.answer import Answer, Update
from workers.api.parsers.registry import parser_of
from workers.api.submission import Submission

MAX_UNREAD_PIECES = 8192  # of one HTTP request, whose client reads more slowly than they come


class ChoicePiece(NamedTuple):
    """A piece of one of the choices."""

    choice: int
    piece: Piece


def submit(
    client: PipelineClient, submission: Submission, cache_salt: bytes, tenant: str
) -> AsyncGenerator[ChoicePiece, None]:
    """The pieces of all choices. Nothing is submitted before one is asked for."""
    choices = [
        client.generate(
            submission.messages,
            to_choice(submission.sampling, index),
            submission.media,
            request_id=f"{submission.request_id}-{index}",
            priority=submission.priority,
            cache_salt=cache_salt,
            tenant=tenant,
        )
        for index in range(submission.num_choices)
    ]
    return side_by_side(choices)


def to_choice(sampling: SamplingParams, index: int) -> SamplingParams:
    """The sampling of one of several answers: each draws numbers of its own."""
    return sampling if sampling.seed is None else with_seed(sampling, "", index)


async def side_by_side(choices: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[ChoicePiece, None]:
    """The pieces of all choices as they come. The first failure ends all, and so does leaving early.

    Raises RequestError when too many have come that were not taken.
    """
    queue: asyncio.Queue[ChoicePiece | BaseException] = asyncio.Queue()

    async def read(index: int, choice: AsyncGenerator[Piece, None]) -> None:
        async with aclosing(choice):
            async for piece in choice:
                queue.put_nowait(ChoicePiece(index, piece))
                if queue.qsize() > MAX_UNREAD_PIECES:
                    raise RequestError("the answer is not read as fast as it comes", status=503)

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(index, choice)) for index, choice in enumerate(choices)]
    for task in tasks:
        task.add_done_callback(on_done)
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            num_open -= item.piece.finish_reason is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Generation:
    """The HTTP endpoints and the offline batches have it in common. Either of the two methods is called,
    once.
    """

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
        self.answer = Answer(submission.num_choices, parser_of(info), client.token_text)

    async def updates(self) -> AsyncGenerator[Update, None]:
        """What comes, as it comes. Leaving early aborts. Raises RequestError."""
        pieces = submit(self._client, self._submission, self._cache_salt, self._tenant)
        async with aclosing(pieces):
            async for index, piece in pieces:
                yield self.answer.add(index, piece)

    async def whole(self) -> Answer:
        """Raises RequestError."""
        async with aclosing(self.updates()) as updates:
            async for update in updates:
                self.answer.keep(update)
        return self.answer
