"""The client library: submits requests straight to the pipeline over ZeroMQ and yields text. The HTTP endpoint uses it too.

    async with PipelineClient(run_dir) as client:
        async for piece in client.generate([ChatMessage("user", "Hello")], SamplingParams()):
            print(piece.text, end="")

It owns its requests until their terminal message: it notices gaps and asks for what it missed, repeats an abort until the
pipeline has answered it, and turns token ids into text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from tokenizers import Tokenizer

from pipeline.config import MAX_ITEMS
from pipeline.detokenizer import Detokenizer, StopStrings, token_bytes
from pipeline.errors import ErrorInfo, PipelineError, RequestError
from pipeline.messages import (
    CLIENT_ID_BYTES,
    PROTOCOL_VERSION,
    AbortRequest,
    Accepted,
    ChatMessage,
    ControlMessage,
    Drain,
    Hello,
    ImagePart,
    IngestMessage,
    Interrupted,
    OutputsMessage,
    Part,
    PipelineState,
    RequestFailed,
    RequestOutput,
    Shutdown,
    SubmitRequest,
    TextPart,
    TokenLogprobs,
    TokenOutputs,
    VideoPart,
    Welcome,
    pack_int32,
    unpack_int32,
)
from pipeline.sampling import FinishReason, SamplingParams
from pipeline.sockets import AsyncReceiver, Sender, Sockets
from pipeline.topology import CONTROL, INGEST, OUTPUTS, Role, WorkerId

logger = logging.getLogger(__name__)
HELLO_INTERVAL_S = 0.1
TICK_S = 1.0  # aborts are repeated, and silence is looked for, this often
QUERY_AFTER_S = 10.0  # of silence before a request is asked about
HEARTBEAT_TIMEOUT_S = 8.0  # the launcher speaks once a second
MAX_ABORTS = 30
PREPROCESS = WorkerId(Role.PREPROCESS)
M = TypeVar("M", ImagePart, VideoPart)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step added to a request. The last piece has a finish reason."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int  # up to and with this piece
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each token, if they were asked for


@dataclass(slots=True)
class _Open:
    """A request between its submission and its terminal message."""

    request: SubmitRequest
    frames: list[bytes | memoryview]
    heard: float
    token_ids: list[int] = field(default_factory=list)  # received so far
    num_prompt_tokens: int = 0
    mm_hashes: tuple[bytes, ...] | None = None  # of the pictures, as first accepted
    is_accepted: bool = False
    is_asking: bool = False  # a query for missed tokens is under way
    events: asyncio.Queue[RequestOutput | ErrorInfo] = field(default_factory=asyncio.Queue)


@dataclass(slots=True)
class _Aborting:
    message: AbortRequest
    num_sent: int = 1


class PipelineClient:
    """One client of a pipeline; any number of requests at once. Use it as an asynchronous context manager, or `start` and `close`."""

    def __init__(self, run_dir: str | Path) -> None:
        self._sockets = Sockets(Path(run_dir), {})
        self._client_id = os.urandom(CLIENT_ID_BYTES)
        self._control: AsyncReceiver[ControlMessage] = self._sockets.async_subscriber(CONTROL)
        self._ingest: Sender[IngestMessage] | None = None
        self._outputs: dict[int, AsyncReceiver[OutputsMessage]] = {}  # by the LLM rank that sends them
        self._welcomed: set[int] = set()
        self._tokenizer: Tokenizer | None = None
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._open: dict[str, _Open] = {}
        self._aborting: dict[str, _Aborting] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._heartbeat = time.monotonic()
        self._end: ErrorInfo | None = None  # set while the pipeline is gone
        self._is_silent = False  # it is gone only in that it does not speak: it may come back
        self.is_draining = False
        self.counters = {"stale_outputs": 0, "gaps": 0, "resubmitted": 0}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def start(self, timeout_s: float = 60.0) -> Welcome:
        """Waits until the pipeline answers. Raises PipelineError if it does not within `timeout_s`, or ends meanwhile."""
        self._start_task(self._read_control())
        try:
            welcome = await asyncio.wait_for(asyncio.shield(self._welcome), timeout_s)
        except TimeoutError:
            await self.close()
            raise PipelineError(f"no pipeline answered in {self._sockets.run_dir} within {timeout_s:.0f} s") from None
        self._tokenizer = Tokenizer.from_file(str(Path(welcome.model_folder) / "tokenizer.json"))
        self._start_task(self._watch())
        return welcome

    async def close(self) -> None:
        """Aborts what is open and leaves; generators that still wait raise."""
        for request_id, opened in list(self._open.items()):
            self._abort(request_id)
            opened.events.put_nowait(ErrorInfo(503, "the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sockets.close(linger_ms=200)

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def failure(self) -> str:
        """Why the pipeline is gone; empty while it is there."""
        return self._end.message if self._end else ""

    async def generate(
        self, messages: Sequence[ChatMessage], sampling: SamplingParams, media: Sequence[bytes | memoryview] = (), request_id: str = "",
        priority: int = 0, cache_salt: bytes = b"",
    ) -> AsyncGenerator[Piece, None]:  # fmt: skip
        """Runs one chat and yields what comes, ending with the piece that has a finish reason.

        `ImagePart(frame=i)` or `VideoPart(frame=i)` in a message names `media[i]`. A lower `priority` goes first. Only requests with an equal
        `cache_salt` share cached prefixes, so that none can tell from the time it takes what another asked. Leaving the
        generator early aborts the request. Raises RequestError when the request is refused or fails.
        """
        request = request_id or f"req-{uuid.uuid4().hex}"
        opened = self._submit(messages, sampling, list(media), request, priority, cache_salt)
        assert self._tokenizer is not None
        detokenizer, stop_strings = Detokenizer(self._tokenizer), StopStrings(sampling.stop)
        try:
            while True:
                event = await opened.events.get()
                if isinstance(event, ErrorInfo):
                    self._open.pop(request, None)
                    raise RequestError.from_info(event)
                token_ids = tuple(unpack_int32(event.new_token_ids).tolist())
                finish = event.finish_reason
                # What comes before `min_tokens` cannot be, or begin, a stop string.
                num_early = max(0, sampling.min_tokens - event.offset)
                text = detokenizer.add(token_ids[:num_early])
                text += stop_strings.add(detokenizer.add(token_ids[num_early:], finish is not None), finish is not None)
                if finish is not None:
                    self._open.pop(request, None)
                if stop_strings.is_hit:
                    finish = FinishReason.STOP
                num_output_tokens = event.offset + len(token_ids)
                yield Piece(text, token_ids, finish, opened.num_prompt_tokens, num_output_tokens, event.num_cached_tokens, event.logprobs)
                if finish is not None:
                    return
        finally:
            if request in self._open:
                self._abort(request)

    def token_text(self, token_id: int) -> bytes:
        """The bytes of one token, which need not be whole characters."""
        assert self._tokenizer is not None
        return token_bytes(self._tokenizer, token_id)

    def _submit(
        self, messages: Sequence[ChatMessage], sampling: SamplingParams, frames: list[bytes | memoryview], request_id: str,
        priority: int, cache_salt: bytes,
    ) -> _Open:  # fmt: skip
        if self._end is not None:
            raise RequestError.from_info(self._end)
        if self.is_draining:
            raise RequestError("the server is shutting down", status=503)
        assert self._ingest is not None
        welcome = self._welcome.result()
        if len(self._open) >= welcome.max_requests:
            raise RequestError(f"{welcome.max_requests} requests are open already", status=429)
        if request_id in self._open or request_id in self._aborting:
            raise RequestError(f"request_id {request_id!r} is in use", field="request_id")
        if not -(2**31) <= priority < 2**31:
            raise RequestError(f"priority must fit 32 bits, got {priority}", field="priority")
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=random.getrandbits(63))
        moved = move_data_urls(messages, frames)
        if len(frames) > MAX_ITEMS:
            raise RequestError(f"the request has {len(frames)} pictures and frames, the limit is {MAX_ITEMS}", field="messages")
        request = SubmitRequest(
            client_id=self._client_id, request_id=request_id, attempt=1, messages=moved, sampling=sampling, priority=priority,
            cache_salt=cache_salt,
        )  # fmt: skip
        try:
            size = len(msgspec.msgpack.encode(request)) + sum(len(frame) for frame in frames)
        except UnicodeEncodeError:
            raise RequestError("the text is not valid Unicode", field="messages") from None
        if size > welcome.max_request_bytes:
            raise RequestError(f"the request has {size} bytes, the limit is {welcome.max_request_bytes}", status=413, field="messages")
        self._ingest.send(request, frames)
        opened = self._open[request_id] = _Open(request, frames, heard=time.monotonic())
        return opened

    def _resubmit(self, opened: _Open) -> None:
        """The next attempt: the same request, to be gone on with behind the tokens that are here."""
        assert self._ingest is not None
        self.counters["resubmitted"] += 1
        request = opened.request
        opened.request = msgspec.structs.replace(request, attempt=request.attempt + 1, output_token_ids=pack_int32(opened.token_ids))
        opened.is_accepted, opened.is_asking, opened.heard = False, False, time.monotonic()
        self._ingest.send(opened.request, opened.frames)

    def _abort(self, request_id: str) -> None:
        request = self._open.pop(request_id).request
        message = AbortRequest(client_id=self._client_id, request_id=request_id, attempt=request.attempt)
        self._aborting[request_id] = _Aborting(message)
        if self._ingest is not None:
            self._ingest.send(message)

    # What comes in.

    async def _read_control(self) -> None:
        while True:
            message = (await self._control.receive()).message
            self._heartbeat = time.monotonic()
            match message:
                case PipelineState():
                    self.is_draining = message.is_draining
                    if self._is_silent:
                        self._end, self._is_silent = None, False
                    epochs = {state.worker: state.epoch for state in message.workers}
                    if not self._outputs and {PREPROCESS, *(WorkerId(Role.LLM, lead) for lead in message.leads)} <= set(epochs):
                        self._connect(epochs, message.leads)
                case Drain():
                    self.is_draining = True
                case Shutdown():
                    self._fail(f"the server has stopped{': ' if message.reason else ''}{message.reason}")
                    if not self._welcome.done():
                        self._welcome.set_exception(PipelineError(self.failure))

    def _connect(self, epochs: dict[WorkerId, int], leads: Sequence[int]) -> None:
        self._sockets.epochs.update(epochs)
        self._ingest = self._sockets.sender(INGEST)
        for lead in leads:
            self._outputs[lead] = self._sockets.async_subscriber(OUTPUTS, self._client_id, lead)
            self._start_task(self._read_outputs(self._outputs[lead]))
        self._start_task(self._say_hello())

    def _start_task(self, work: Coroutine[None, None, None]) -> None:
        """A task whose failure ends every request, instead of leaving them to wait for ever."""

        def on_done(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the client library failed", exc_info=error)
                self._fail(f"the client library failed: {type(error).__name__}")

        task = asyncio.create_task(work)
        task.add_done_callback(on_done)
        self._tasks.append(task)

    async def _say_hello(self) -> None:
        assert self._ingest is not None
        while not self._welcome.done():
            self._ingest.send(Hello(client_id=self._client_id, protocol=PROTOCOL_VERSION))
            with contextlib.suppress(TimeoutError, PipelineError):
                await asyncio.wait_for(asyncio.shield(self._welcome), HELLO_INTERVAL_S)

    async def _read_outputs(self, outputs: AsyncReceiver[OutputsMessage]) -> None:
        while True:
            message = (await outputs.receive()).message
            match message:
                case Welcome():
                    self._accept_welcome(message)
                case Accepted():
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        self._on_accepted(opened, message)
                case TokenOutputs():
                    for output in message.outputs:
                        self._take(output)
                case RequestFailed():
                    self._aborting.pop(message.request_id, None)
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        opened.events.put_nowait(message.error)
                case Interrupted():
                    self._aborting.pop(message.request_id, None)
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        logger.info("%s was interrupted (%s): submitted again", message.request_id, message.reason)
                        self._resubmit(opened)

    def _on_accepted(self, opened: _Open, message: Accepted) -> None:
        """An answer must not go on behind tokens that were about another picture."""
        opened.is_accepted, opened.num_prompt_tokens = True, message.num_prompt_tokens
        if opened.mm_hashes is not None and opened.mm_hashes != message.mm_hashes:
            opened.events.put_nowait(ErrorInfo(409, "a picture's URL gives another picture than before the request was interrupted", "messages"))
            self._abort(message.request_id)
        opened.mm_hashes = message.mm_hashes

    def _accept_welcome(self, welcome: Welcome) -> None:
        """Ready when every group knows us: any of them may run what we submit."""
        self._welcomed.add(welcome.sender.rank)
        if self._welcome.done():
            return
        if welcome.protocol != PROTOCOL_VERSION:
            self._welcome.set_exception(PipelineError(f"the pipeline speaks protocol {welcome.protocol}, this client {PROTOCOL_VERSION}"))
        elif self._welcomed >= set(self._outputs):
            self._welcome.set_result(welcome)

    def _find(self, request_id: str, attempt: int) -> _Open | None:
        opened = self._open.get(request_id)
        if opened is None or opened.request.attempt != attempt:
            self.counters["stale_outputs"] += 1
            return None
        opened.heard = time.monotonic()
        return opened

    def _take(self, output: RequestOutput) -> None:
        """Passes on what is new; a repeated answer to a query overlaps with what is there, a gap is asked for."""
        if output.finish_reason is not None:
            self._aborting.pop(output.request_id, None)
        if (opened := self._find(output.request_id, output.attempt)) is None:
            return
        num_received = len(opened.token_ids)
        if output.offset > num_received:
            self.counters["gaps"] += 1
            self._query(opened)
            return
        opened.is_asking = False
        known = num_received - output.offset
        token_ids = output.new_token_ids[4 * known :]
        if token_ids or output.finish_reason is not None:
            logprobs = output.logprobs[known:]
            opened.events.put_nowait(msgspec.structs.replace(output, offset=num_received, new_token_ids=token_ids, logprobs=logprobs))
            opened.token_ids += unpack_int32(token_ids).tolist()

    def _query(self, opened: _Open) -> None:
        """Asks for what was missed: the same request with the same attempt. Its media go along only if it may never have come in."""
        if opened.is_asking or self._ingest is None:
            return
        opened.is_asking, opened.heard = True, time.monotonic()
        request = msgspec.structs.replace(opened.request, num_received=len(opened.token_ids))
        if opened.is_accepted:
            self._ingest.send(msgspec.structs.replace(request, messages=()))
        else:
            self._ingest.send(request, opened.frames)

    async def _watch(self) -> None:
        """Repeats aborts, asks about silent requests, notices that the launcher is gone."""
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if now - self._heartbeat > HEARTBEAT_TIMEOUT_S and self._end is None:
                self._fail("the server no longer answers")
                self._is_silent = True
            for request_id, aborting in list(self._aborting.items()):
                aborting.num_sent += 1
                if aborting.num_sent > MAX_ABORTS:
                    del self._aborting[request_id]
                elif self._ingest is not None:
                    self._ingest.send(aborting.message)
            for opened in self._open.values():
                if now - opened.heard > QUERY_AFTER_S and self._ingest is not None:
                    # Hello first: if we were cut off for not reading, it makes us known again.
                    self._ingest.send(Hello(client_id=self._client_id, protocol=PROTOCOL_VERSION))
                    opened.is_asking = False
                    self._query(opened)

    def _fail(self, reason: str) -> None:
        self._end = ErrorInfo(503, reason)
        for opened in self._open.values():
            opened.events.put_nowait(self._end)


def move_data_urls(messages: Sequence[ChatMessage], frames: list[bytes | memoryview]) -> tuple[ChatMessage, ...]:
    """Puts what stands in `data:` URLs into frames, so that large media are neither scanned nor copied as text on their way."""
    return tuple(_move_data_urls(message, frames) for message in messages)


def _move_data_urls(message: ChatMessage, frames: list[bytes | memoryview]) -> ChatMessage:
    if isinstance(message.content, str):
        return message
    parts: list[Part] = []
    for part in message.content:
        if isinstance(part, VideoPart) and part.frames:
            parts.append(msgspec.structs.replace(part, frames=tuple(_move_data_url(frame, frames) for frame in part.frames)))
        elif isinstance(part, VideoPart):
            parts.append(_move_data_url(part, frames))
        else:
            parts.append(part if isinstance(part, TextPart) else _move_data_url(part, frames))
    return ChatMessage(message.role, tuple(parts))


def _move_data_url(part: M, frames: list[bytes | memoryview]) -> M:
    if part.url[:5].lower() != "data:":
        return part
    header, comma, payload = part.url.partition(",")
    if not comma:
        raise RequestError("a data: URL has a comma before its data", field="messages")
    is_base64 = header.lower().endswith(";base64")
    frames.append(payload.encode("utf-8", "surrogatepass") if is_base64 else unquote_to_bytes(payload))
    return msgspec.structs.replace(part, url="", frame=len(frames) - 1, is_base64=is_base64)
