"""The endpoint over real sockets, in the test's own process, with a stand-in for the pipeline."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from pipeline.client.client import Piece
from pipeline.config import ApiConfig
from pipeline.parsers.forms import ChatForms
from pipeline.wire.control import WorkerState
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.sampling import FinishReason
from tests.workers.api.description.conformance import Conformance
from workers.api.listener import Listener
from workers.api.runner import HttpRunner
from workers.api.server import ApiServer

CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}]}).encode()
STREAMED_CHAT = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "stream": True}).encode()
Pieces = AsyncGenerator[Piece, None]


def piece(text: str, finish_reason: FinishReason | None = None) -> Piece:
    return Piece(text, (1,), finish_reason, 1, 1)


async def one_word() -> Pieces:
    yield piece("Hi", FinishReason.STOP)


class FakeClient:
    """Answers each choice of every chat with what `answer` yields, and keeps the media of the last one."""

    def __init__(self, answer: Callable[[], Pieces] = one_word) -> None:
        self.answer, self.failure, self.is_draining = answer, "", False
        self.welcome = SimpleNamespace(max_model_len=8192)
        self.workers: tuple[WorkerState, ...] = ()
        self.leads: tuple[int, ...] = (0,)
        self.num_asked = 0
        self.media: Sequence[bytes | memoryview] = ()
        self.options: dict[str, Any] = {}
        self.sampling: list[Any] = []  # of all
        self.prompts: list[Any] = []

    def generate(
        self,
        messages: Any,
        sampling: Any,
        media: Sequence[bytes | memoryview] = (),
        **options: Any,
    ) -> Pieces:
        self.num_asked += 1
        self.media, self.options = media, options
        self.sampling.append(sampling)
        self.prompts.append(messages)
        return self.answer() if sampling.n == 1 else self._choices(sampling.n)

    async def _choices(self, count: int) -> Pieces:
        for index in range(count):
            async for piece in self.answer():
                yield dataclasses.replace(piece, index=index)

    def token_text(self, token_id: int) -> bytes:
        return b"x"


def endpoint(
    client: FakeClient | None = None,
    is_ready: bool = True,
    forms: ChatForms | None = None,
    model_names: tuple[str, ...] = ("m",),
    **options: Any,
) -> ApiServer:
    api = {name: options.pop(name) for name in list(options) if name in ApiConfig.__slots__}
    info = SimpleNamespace(default_sampling={})
    server = ApiServer(
        ApiConfig(**api),
        cast(Any, client or FakeClient()),
        model_names,
        cast(Any, info),
        forms=forms,
        **options,
    )
    if is_ready:
        server.set_ready()
    return server


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def error(self) -> ErrorInfo:
        """Of OpenAI's object, whose fields are all there."""
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] is None or error["code"]
        return ErrorInfo(self.status, error["message"], error["param"] or "", error["code"] or "")


class Wire(NamedTuple):
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 20)).decode().split("\r\n")
        pairs = (line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), {name.lower(): value for name, value in pairs}

    async def answer(self) -> Answer:
        """The next one, which has a length."""
        status, headers = await self.head()
        return Answer(status, headers, await self.reader.readexactly(int(headers.get("content-length", 0))))

    async def rest(self, timeout_s: float = 20) -> bytes:
        """What comes until the server closes the connection."""
        return await asyncio.wait_for(self.reader.read(), timeout_s)


class Site(NamedTuple):
    host: str
    port: int

    @asynccontextmanager
    async def connect(self, local: str = "127.0.0.1") -> AsyncIterator[Wire]:
        """From a loopback address of one's own."""
        wire = Wire(*await asyncio.open_connection(self.host, self.port, local_addr=(local, 0)))
        try:
            yield wire
        finally:
            wire.writer.close()

    async def ask(self, request: bytes, local: str = "127.0.0.1") -> Answer:
        async with self.connect(local) as wire:
            await wire.send(request)
            return await wire.answer()


def post(body: bytes = CHAT, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    """The bytes of a request. With a Content-Length unless a header has one, or Transfer-Encoding; of JSON
    unless a header has another type."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", *headers]
    if not any(line.lower().startswith("content-type") for line in headers):
        lines.append("Content-Type: application/json")
    if not any(line.lower().startswith(("content-length:", "transfer-encoding:")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


@asynccontextmanager
async def serving(
    server: ApiServer, tls: ssl.SSLContext | None = None, **options: Any
) -> AsyncIterator[Site]:
    """Whatever the server answers is held against its description."""
    application, conformance = server.application(), Conformance(server)
    application.on_response_prepare.append(conformance.check)
    runner = HttpRunner(application, shutdown_timeout=0.1, **options)
    await runner.setup()
    listening = socket.create_server(("127.0.0.1", 0))
    await Listener(runner, listening, tls).start()
    try:
        yield Site(*listening.getsockname()[:2])
    finally:
        await runner.cleanup()
    assert conformance.violations == []
