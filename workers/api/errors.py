"""Error responses: to a request, inside a stream that has begun, and on a connection without a request."""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from pipeline.wire.errors import CONTEXT_LENGTH_EXCEEDED, MODEL_NOT_FOUND, ErrorInfo

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded", 503: "service_unavailable"}
# OpenAI's type for these codes does not follow from their status, and clients look for it.
INVALID_REQUEST, INVALID_REQUESTS = "invalid_request_error", (CONTEXT_LENGTH_EXCEEDED, MODEL_NOT_FOUND)
RETRY_AFTER_S = "2"
LAST_WORDS_S = 1.0  # to write a stream's last event, as the client may not read


def error_body(error: ErrorInfo) -> dict[str, Any]:
    """OpenAI's error object. Its code is a string or null: the status is that of the response."""
    kind = ERROR_TYPES.get(error.status, INVALID_REQUEST if error.status < 500 else "server_error")
    return {
        "error": {
            "message": error.message,
            "type": INVALID_REQUEST if error.code in INVALID_REQUESTS else kind,
            "param": error.field or None,
            "code": error.code or CODES.get(error.status),
        }
    }


def error_headers(status: int) -> dict[str, str]:
    match status:
        case 401:
            return {"WWW-Authenticate": "Bearer"}
        case 429 | 503:
            return {"Retry-After": RETRY_AFTER_S}
        case _:
            return {}


def error_response(error: ErrorInfo, body: dict[str, Any] | None = None) -> web.Response:
    """`body` replaces OpenAI's error object on a route with its own."""
    return web.json_response(
        body or error_body(error), status=error.status, headers=error_headers(error.status)
    )


def raw_error_response(error: ErrorInfo) -> bytes:
    """The bytes of a whole response, for a connection on which no request has been read."""
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


async def end_stream(response: web.StreamResponse, last_words: bytes) -> None:
    """Writes an error into a stream whose head was sent, and ends the stream and its connection."""
    response.force_close()
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_S):
            await response.write(last_words)
            await response.write_eof()
