"""Accepts connections: all that wait, where libuv accepts one in a turn of the event loop, so that with many
that begin at once each would wait for as many turns as there are before it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl

from aiohttp import web

logger = logging.getLogger(__name__)
MAX_IN_A_TURN = 32
PAUSE_S = 0.5  # where no more can be accepted now
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # that pass
HANDSHAKE_S = 10.0  # for TLS


class Listener(web.BaseSite):
    """Serves the connections of one listening socket, which it owns."""

    def __init__(
        self, runner: web.BaseRunner, listening: socket.socket, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(runner, ssl_context=tls)
        self._socket = listening
        self._connecting: set[asyncio.Task[None]] = set()
        self._resuming: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return str(self._socket.getsockname())

    async def start(self) -> None:
        await super().start()
        self._socket.setblocking(False)
        self._socket.listen(self._backlog)
        self._resume()

    async def stop(self) -> None:
        if self._resuming is not None:
            self._resuming.cancel()
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        for task in self._connecting:
            task.cancel()
        await super().stop()

    def _resume(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(MAX_IN_A_TURN):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in SHORTAGES:
                    raise
                logger.warning("no connection can be accepted now: %s", error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._socket)
                self._resuming = loop.call_later(PAUSE_S, self._resume)
                return
            connection.setblocking(False)
            task = asyncio.create_task(self._connect(connection))
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self, connection: socket.socket) -> None:
        timeout = None if self._ssl_context is None else HANDSHAKE_S
        make_protocol = self._runner.server
        assert make_protocol is not None, "the site has started"
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                make_protocol, connection, ssl=self._ssl_context, ssl_handshake_timeout=timeout
            )
        except OSError as error:  # also of TLS
            logger.debug("a connection failed as it began: %s", error)
            connection.close()
