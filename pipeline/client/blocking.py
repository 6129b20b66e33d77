"""The client library for programs without asyncio.

    with BlockingClient(run_dir) as client:
        for piece in client.generate([ChatMessage("user", "Hello")], SamplingParams()):
            print(piece.text, end="")

Runs a `PipelineClient` in an event loop on its own thread; any number of threads may use one client.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pipeline.client.client import ParsedPiece, Piece, PipelineClient
from pipeline.wire.clients import Welcome
from pipeline.wire.prompts import Chat, ChatMessage, Prompt
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.trace_context import TraceContext

T = TypeVar("T")
P = TypeVar("P", Piece, ParsedPiece)


class BlockingClient:
    """Use it as a context manager, or `start` and `close`."""

    def __init__(
        self, place: str | Path, keys: str | Path | None = None, model_folder: str | Path | None = None
    ) -> None:
        """As `PipelineClient`."""
        self._place, self._keys, self._model_folder = place, keys, model_folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pipeline-client", daemon=True)
        self._client: PipelineClient | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, timeout_s: float = 60.0) -> Welcome:
        """Waits until the pipeline answers.

        Raises PipelineError if it does not within `timeout_s`, or ends meanwhile.
        """

        async def start() -> Welcome:
            self._client = PipelineClient(self._place, self._keys, self._model_folder)
            return await self._client.start(timeout_s)

        self._thread.start()
        try:
            return self._run(start())
        except BaseException:
            self._client = None  # its `start` has closed it
            self.close()
            raise

    def close(self) -> None:
        """Aborts the open requests and leaves; iterators that still wait raise RequestError."""
        if self._client is not None:
            self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(
        self, prompt: Sequence[ChatMessage] | Prompt, sampling: SamplingParams,
        media: Sequence[bytes | memoryview] = (), request_id: str = "",
        priority: int = 0, cache_salt: bytes = b"", tenant: str = "",
        trace_context: TraceContext | None = None, adapter: str = "",
    ) -> Iterator[Piece]:  # fmt: skip
        """As `PipelineClient.generate`; leaving the iteration early, or closing the iterator, aborts the
        request."""
        assert self._client is not None
        return self._read(
            self._client.generate(
                prompt,
                sampling,
                media,
                request_id,
                priority,
                cache_salt,
                tenant,
                trace_context,
                adapter=adapter,
            )
        )

    def chat(
        self, prompt: Chat, sampling: SamplingParams, media: Sequence[bytes | memoryview] = (),
        request_id: str = "", priority: int = 0, cache_salt: bytes = b"", tenant: str = "",
        trace_context: TraceContext | None = None,
        tool_choice: str | Mapping[str, Any] | None = None, parallel_tool_calls: bool = True,
        adapter: str = "",
    ) -> Iterator[ParsedPiece]:  # fmt: skip
        """As `PipelineClient.chat`; leaving early aborts the request, too."""
        assert self._client is not None
        return self._read(
            self._client.chat(
                prompt,
                sampling,
                media,
                request_id,
                priority,
                cache_salt,
                tenant,
                trace_context,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                adapter=adapter,
            )
        )

    def _read(self, pieces: AsyncGenerator[P, None]) -> Iterator[P]:
        read: queue.SimpleQueue[P | BaseException | None] = queue.SimpleQueue()  # None: the end

        async def pump() -> None:
            try:
                async with aclosing(pieces):
                    async for piece in pieces:
                        read.put(piece)
                read.put(None)
            except Exception as error:  # noqa: BLE001  raised where the pieces are read
                read.put(error)

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while True:
                item = read.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            future.cancel()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
