"""The events of a stream, as OpenAI's endpoints send them."""

from __future__ import annotations

from typing import Any

import msgspec

# Proxies buffer a stream by default; X-Accel-Buffering turns that off in nginx.
STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
DONE = b"data: [DONE]\n\n"
_HOLE = "\x00"


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class EventForm:
    """Events that differ in one value: all else is encoded once, as a stream has an event a token."""

    def __init__(self, body: dict[str, Any], path: tuple[str | int, ...]) -> None:
        """`path`: keys and indexes that lead to the value, where `body` has none yet."""
        *way, last = path
        place: Any = body
        for key in way:
            place = place[key]
        place[last] = _HOLE
        self._before, self._behind = event(body).split(msgspec.json.encode(_HOLE))

    def event(self, value: object) -> bytes:
        return self._before + msgspec.json.encode(value) + self._behind
