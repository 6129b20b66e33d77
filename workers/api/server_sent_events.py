"""The events of a stream, as OpenAI's endpoints send them."""

from __future__ import annotations

import msgspec

DONE = b"data: [DONE]\n\n"


def event(body: object) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
