"""Errors as OpenAI's objects: as an answer, inside a stream that has begun, and before there is a request."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus

import msgspec
from aiohttp import web

from pipeline.wire.errors import ErrorInfo
from workers.api.protocol import error_body
from workers.api.stream import DONE, error_event

RETRY_AFTER_S = "2"
LAST_WORDS_S = 1.0  # for the last event of a stream, whose reader may not read


def error_headers(status: int) -> dict[str, str]:
    match status:
        case 401:
            return {"WWW-Authenticate": "Bearer"}
        case 429 | 503:
            return {"Retry-After": RETRY_AFTER_S}
        case _:
            return {}


def error_response(error: ErrorInfo) -> web.Response:
    return web.json_response(error_body(error), status=error.status, headers=error_headers(error.status))


def raw_error_response(error: ErrorInfo) -> bytes:
    """A whole answer, for a connection on which no request has been read."""
    body = msgspec.json.encode(error_body(error))
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **error_headers(error.status),
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def end_stream(response: web.StreamResponse, error: ErrorInfo) -> None:
    """Tells an error in a stream whose head has gone out, and ends the stream and its connection."""
    response.force_close()
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await response.write(error_event(error) + DONE)
            await response.write_eof()
