"""One connection to the endpoint, with the limits that aiohttp's protocol lacks.

Limits how long a client may take to send a head, stay idle, and read its answer; answers bytes that are no
HTTP. (`read_body` limits the time of a body.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from aiohttp import web
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import BadHttpMethod, InvalidURLError, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader

from pipeline.wire.errors import ErrorInfo
from workers.api.bodies import CONTINUE
from workers.api.errors import LAST_WORDS_S, error_response, raw_error_response

logger = logging.getLogger(__name__)
MAX_LINE_BYTES = 32 << 10  # of the request line and of each header: proxies' cookies and tokens are long
MAX_HEAD_BYTES = 128 << 10
FIRST_PROBE_S = 0.02  # by then the request that has come with the end is being handled
PROBE_INTERVAL_S = 5.0  # between probes of a client that sends no more
TCP_CLOSE = 7  # the kernel's number of the state
REFUSED_HEAD_S = 1.0  # to discard what follows bytes that are no HTTP


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a client may take, in seconds."""

    head_s: float = 10.0  # from a head's first byte, or the connection's beginning, to the head's end
    idle_s: float = 75.0  # between two requests
    reading_s: float = 60.0  # without reading anything while its answer is blocked
    closing_s: float = 5.0  # to read the rest of its answer when the connection closes


class HttpConnection(web.RequestHandler):
    """`make_room` returns whether there is room for one more connection."""

    def __init__(
        self, server: web.Server, make_room: Callable[[], bool], patience: Patience, **options: Any
    ) -> None:
        super().__init__(server, **options)
        self._make_room, self._patience = make_room, patience
        self._tcp: asyncio.Transport | None = None  # kept after aiohttp has dropped its `transport`
        self._body: StreamReader = EMPTY_PAYLOAD  # of the newest request
        self._head_since: float | None = None  # when the incoming head began
        self._num_head_bytes = 0
        self._heard = 0.0
        self._blocked_since: float | None = None  # since when the client reads nothing
        self._closing_since: float | None = None
        self._is_broken = False  # further bytes are discarded
        self._half_closed_since: float | None = None  # since the client's last probe, once it sends no more
        self._has_left = asyncio.Event()  # the client sends no more

    # From the client.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._tcp = cast(asyncio.Transport, transport)
        self._heard = self._head_since = self._loop.time()
        if self._make_room():
            super().connection_made(transport)
        else:
            self._is_broken = True
            self._tcp.write(raw_error_response(ErrorInfo(503, "too many connections are open")))
            self._tcp.close()

    def data_received(self, data: bytes) -> None:
        if self._is_broken:
            return
        was_in_body, num_requests = not self._body.is_eof(), self._request_count
        super().data_received(data)
        if data:
            self._heard = self._loop.time()
        if self._request_count > num_requests:
            self._on_head()
        elif data and not was_in_body:
            self._num_head_bytes += len(data)
            if self._head_since is None:
                self._head_since = self._heard
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse_head(ErrorInfo(431, f"the head is longer than {MAX_HEAD_BYTES >> 10} KiB"))

    def _on_head(self) -> None:
        """The parser has produced a request or an error."""
        self._head_since, self._num_head_bytes = None, 0
        message, body = self._messages[-1]
        if isinstance(message, RawRequestMessage):
            self._body = body
            return
        self._is_broken = True
        # An error within a body is reported by the request that reads this body.
        if not self._body.is_eof() and self._waiter is None:
            self._messages.pop()
            self._body.set_exception(web.RequestPayloadError("broken"))
            self._body.feed_eof()

    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it
        """True keeps the connection: whoever has only stopped sending still reads its answer."""
        self._has_left.set()
        super().eof_received()
        if self._tcp is None or not self._tcp.can_write_eof():
            return None  # TLS has no half-closed connections
        if self.is_idle or self._is_broken or not self._body.is_eof():
            return None
        self._half_closed_since = self._loop.time()
        self._loop.call_later(FIRST_PROBE_S, self._probe)
        return True

    def _probe(self) -> None:
        """Sends a client that sends no more something to read, or cuts it off where nothing may be sent.

        A client that has gone looks like one that has only stopped sending, until its kernel resets the
        connection because of what we send. Any client ignores a further 100 Continue before its answer
        (RFC 9110); where the answer has begun, its next part is the probe.
        """
        request, tcp = self._current_request, self._tcp
        if request is None or tcp is None or tcp.is_closing() or request.writer.output_size > 0:
            return
        if request.version >= HttpVersion11:
            tcp.write(CONTINUE)
        else:
            tcp.abort()

    def _watch_half_closed(self, since: float, now: float, tcp: asyncio.Transport) -> None:
        """Reading has stopped at the end of what the client sent: a reset is not reported."""
        info = tcp.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        if info[0] == TCP_CLOSE:
            tcp.abort()
        elif now - since > PROBE_INTERVAL_S:
            self._half_closed_since = now
            self._probe()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._has_left.set()
        self._tcp = None
        super().connection_lost(exc)

    # To the client.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._blocked_since = self._loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._blocked_since = None

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to bytes that aiohttp's parser refuses, or (500) to an error in the server."""
        if status == 500:
            logger.error("a request failed", exc_info=exc)
        else:
            logger.debug("no HTTP from %s: %s", request.remote, type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        response = error_response(explain(status, exc))
        response.force_close()
        return response

    async def finish_response(
        self,
        request: web.BaseRequest,
        resp: web.StreamResponse,
        start_time: float | None,
    ) -> tuple[web.StreamResponse, bool]:
        is_last = (self._is_broken or self._half_closed_since is not None) and not self._messages
        if is_last:
            resp.force_close()
        finished = await super().finish_response(request, resp, start_time)
        self._heard = self._loop.time()
        if is_last:
            await self._linger()
        return finished

    async def _linger(self) -> None:
        """Waits for the client to stop sending: closing earlier would reset the connection, and lose the
        answer."""
        if self._tcp is not None and not self._tcp.is_closing():
            if self._tcp.can_write_eof():
                self._tcp.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_left.wait(), REFUSED_HEAD_S)

    def _refuse_head(self, error: ErrorInfo) -> None:
        self._is_broken = True
        if self._tcp is not None and self.is_idle:
            self._tcp.write(raw_error_response(error))
            if self._tcp.can_write_eof():
                self._tcp.write_eof()
            self._loop.call_later(REFUSED_HEAD_S, self.force_close)
        else:
            self.force_close()

    # Time limits.

    @property
    def is_idle(self) -> bool:
        """No request is being handled."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def idle_since(self) -> float:
        """When the connection fell idle, to choose one to close; with an unfinished head, when that began."""
        return self._heard if self._head_since is None else self._head_since

    def watch(self, now: float) -> None:
        """Ends the connection if its client takes too long."""
        patience, tcp = self._patience, self._tcp
        if tcp is None:
            return
        if tcp.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > patience.closing_s:
                tcp.abort()
        elif self._blocked_since is not None and now - self._blocked_since > patience.reading_s:
            logger.debug("a client does not read its answer: cut off")
            tcp.abort()
        elif self._half_closed_since is not None:
            if self.is_idle:  # the client's end came between the answer's end and the wait for a request
                self.force_close()
            else:
                self._watch_half_closed(self._half_closed_since, now, tcp)
        elif self.is_idle and not self._is_broken:
            if self._head_since is None:
                if now - self._heard > patience.idle_s:
                    self.force_close()
            elif now - self._head_since > patience.head_s:
                if self._num_head_bytes:
                    self._refuse_head(ErrorInfo(408, "the head of the request comes too slowly"))
                else:
                    self.force_close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:  # noqa: ASYNC109
        """Cancels handlers that do not end in time; they may answer before the transport is closed."""
        if (task := self._task_handler) is not None:
            await asyncio.wait([task], timeout=timeout)
            task.cancel()
            await asyncio.wait([task], timeout=LAST_WORDS_S)
        await super().shutdown(timeout)


def explain(status: int, error: BaseException | None) -> ErrorInfo:
    """The error, without the client's own bytes, which aiohttp's message would show."""
    match error:
        case LineTooLong():
            return ErrorInfo(431, f"a line of the head is longer than {MAX_LINE_BYTES >> 10} KiB")
        case BadHttpMethod():
            return ErrorInfo(status, "this is no HTTP request: its method is none")
        case InvalidURLError():
            return ErrorInfo(status, "the URL of the request is not valid")
        case _ if status < 500:
            return ErrorInfo(status, "the request is not valid HTTP")
        case _:
            return ErrorInfo(500, "the server made a mistake")
