"""Request bodies: which are accepted, how fast they must arrive, and how much memory they take."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from aiohttp import web
from aiohttp.http import HttpVersion11

from pipeline.config import MIB
from pipeline.wire.errors import RequestError
from workers.api.budget import BudgetLease

BASE_BYTES = 256 << 10  # that each request takes from the budget: bytes buffered before it is handled
STEP_BYTES = 1 << 20  # by which the lease of a body of unknown length grows
EXPECTATION = web.RequestKey("expectation", str)  # the `Expect` header, which is hidden from aiohttp
JSON = "application/json"
CONTINUE_WORD = "100-continue"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyPace:
    """The least speed of a body: `bytes_per_s` on average, plus `grace_s` seconds."""

    grace_s: float = 30.0
    bytes_per_s: float = 16 << 10


def refuse_body(request: web.Request, max_mib: int) -> None:
    """Raises RequestError for a body that can be refused by its head.

    415: the body is encoded. A compressed MiB may be a GiB, and inflating takes the event loop's time:
    nothing is inflated here, not even refused bodies. (`auto_decompress` is off in `HttpRunner`.)
    """
    for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        for value in request.headers.getall(header, []):
            for coding in value.split(","):
                if (name := coding.strip().lower()) not in ("", plain):
                    what = f"{header} {name[:40]!r} is not taken: send the body as it is"
                    raise RequestError(what, status=415)
    if (request.content_length or 0) > max_mib * MIB:
        raise too_large(max_mib)
    if request.get(EXPECTATION, CONTINUE_WORD).lower() != CONTINUE_WORD:
        raise RequestError("of what may be expected only 100-continue is served", status=417)


def refuse_type(request: web.Request) -> None:
    """Raises RequestError (415) for a body that is not JSON by its head.

    A web page may send a body of another type, or of none, to any server, without asking it first (CORS).
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_json = kind == JSON or (kind.startswith("application/") and kind.endswith("+json"))
    if request.body_exists and not is_json:
        what = f"the Content-Type is {kind[:40]!r}" if kind else "the Content-Type is missing"
        raise RequestError(f"{what}: send JSON, as {JSON}", status=415)


def too_large(max_mib: int) -> RequestError:
    return RequestError(f"the body is larger than {max_mib} MiB", status=413)


async def read_body(request: web.Request, lease: BudgetLease, pace: BodyPace, max_mib: int) -> bytearray:
    """The whole body. Its bytes are taken from the budget before they are read.

    Raises RequestError: 400 for a broken body, 408 for a slow one, 413 for a large one, 503 without memory.
    """
    await lease.grow(request.content_length or 0)
    await _say_continue(request)
    body = bytearray()
    started = asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(started + pace.grace_s + len(body) / pace.bytes_per_s):
                chunk = await request.content.readany()
        except TimeoutError:
            raise RequestError("the body comes too slowly", status=408) from None
        except web.RequestPayloadError:
            what = "the body is not what its head says: its length or its chunks are wrong"
            raise RequestError(what) from None
        if not chunk:
            return body
        num_bytes = len(body) + len(chunk)
        if num_bytes > max_mib * MIB:
            raise too_large(max_mib)
        if num_bytes > lease.num_bytes:
            began = asyncio.get_running_loop().time()
            await lease.grow(num_bytes + STEP_BYTES)
            started += asyncio.get_running_loop().time() - began  # nothing was read while waiting for memory
        body += chunk


async def _say_continue(request: web.Request) -> None:
    """Sends 100 Continue to a client that waits for it before it sends the body."""
    if EXPECTATION in request and request.version >= HttpVersion11 and not request.content.is_eof():
        await request.writer.write(CONTINUE)
        request.writer.output_size = 0  # the answer has not begun
