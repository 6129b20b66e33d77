"""Paths as clients write them: with double or trailing slashes, without `/v1`, or of routes not served."""

from __future__ import annotations

import re
from collections.abc import Iterable

from aiohttp import web
from aiohttp.http import RawRequestMessage
from yarl import URL

PREFIX = "/v1"
MAX_SHOWN_PATH = 100
_SLASHES = re.compile(r"//+")


def with_plain_path(message: RawRequestMessage) -> RawRequestMessage:
    """The same request, for its path without double and trailing slashes."""
    path, mark, query = message.path.partition("?")
    plain = _SLASHES.sub("/", path).rstrip("/") or "/"
    if plain == path or not path.startswith("/"):
        return message
    url = URL.build(path=plain, query_string=query, encoded=True)
    return message._replace(path=f"{plain}{mark}{query}", url=url)


def spellings(path: str) -> tuple[str, ...]:
    """The paths at which a route is found: clients of llama.cpp leave out `/v1`."""
    short = path.removeprefix(PREFIX)
    return (path,) if short == path else (path, short)


def explain(error: web.HTTPException, method: str, path: str, served: Iterable[str]) -> str:
    """What is wrong with a request that no route takes."""
    what = f"{method} {path[:MAX_SHOWN_PATH]}"
    match error.status:
        case 404:
            return f"{what} is not served here. This server generates text: {', '.join(served)}"
        case 405:
            return f"{what}: the method is not allowed, only {error.headers['Allow']}"
        case _:
            return f"{what}: {error.reason}"
