"""Makes the endpoint's connections, up to a limit, and checks all of them for slow clients."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpVersion11, RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from pipeline.config.api import MAX_CONNECTIONS
from workers.api.bodies import EXPECTATION
from workers.api.connections import MAX_LINE_BYTES, HttpConnection, Patience
from workers.api.paths import with_plain_path

READ_BUFFER_BYTES = 64 << 10  # of unread body; the transport pauses at twice that
REFUSED_BODY_S = 5.0  # to read the rest: a client that is cut off while it sends does not read the answer
OTHER_FILES = 128  # descriptors left for other files of this process
WATCH_INTERVAL_S = 0.5
NEVER_S = 7 * 24 * 3600.0  # aiohttp's own keep-alive timeout would end a head that is just coming in


def connections_allowed() -> int:
    """As many as the limit of open files leaves room for."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(MAX_CONNECTIONS, most - OTHER_FILES if most >= 2 * OTHER_FILES else most // 2)


class HttpServer(web.Server):
    """Makes connections."""

    def __init__(self, patience: Patience, most: int, **options: Any) -> None:
        super().__init__(**options)
        self._patience, self._most = patience, most

    def __call__(self) -> HttpConnection:
        return HttpConnection(self, self.make_room, self._patience, loop=self._loop, **self._kwargs)

    def make_room(self) -> bool:
        """Whether one more connection fits. At the limit, closes the connection that is idle longest."""
        if len(self._connections) < self._most:
            return True
        idle = [connection for connection in self._ours() if connection.is_idle]
        if not idle:
            return False
        min(idle, key=lambda connection: connection.idle_since).force_close()
        return True

    def watch(self, now: float) -> None:
        for connection in self._ours():
            connection.watch(now)

    def _ours(self) -> list[HttpConnection]:
        return cast(list[HttpConnection], self.connections)


class HttpRunner(web.AppRunner):
    """An `AppRunner` with limits against slow or too many clients."""

    def __init__(
        self,
        application: web.Application,
        patience: Patience | None = None,
        max_connections: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(application, **options)
        self._patience = patience or Patience()
        self._max_connections = connections_allowed() if max_connections is None else max_connections
        self._watching: asyncio.Task[None] | None = None

    async def _make_server(self) -> HttpServer:
        made = await super()._make_server()
        server = HttpServer(
            self._patience,
            self._max_connections,
            handler=made.request_handler,
            request_factory=_prepared(made.request_factory),
            handler_cancellation=True,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=NEVER_S,
            lingering_time=REFUSED_BODY_S,
            read_bufsize=READ_BUFFER_BYTES,
            max_line_size=MAX_LINE_BYTES,
            max_field_size=MAX_LINE_BYTES,
        )

        async def watch() -> None:
            while True:
                await asyncio.sleep(WATCH_INTERVAL_S)
                server.watch(asyncio.get_running_loop().time())

        self._watching = asyncio.create_task(watch())
        return server

    async def _cleanup_server(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super()._cleanup_server()


def _prepared(make_request: Any) -> Any:
    """Gives aiohttp the path without superfluous slashes, and hides the `Expect` header from it, which it
    would answer before any check; `read_body` does."""

    def make(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
        message = with_plain_path(message)
        expectation = message.headers.get("Expect")
        if expectation is None:
            return cast(web.BaseRequest, make_request(message, *rest))
        headers = CIMultiDict(message.headers)
        headers.popall("Expect")
        request: web.BaseRequest = make_request(message._replace(headers=CIMultiDictProxy(headers)), *rest)
        if message.version >= HttpVersion11:
            request[EXPECTATION] = expectation
        return request

    return make
