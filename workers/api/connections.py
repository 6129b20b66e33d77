"""The endpoint's connections: what aiohttp's protocol leaves open, closed."""

from __future__ import annotations

from typing import Any

from aiohttp import web

IDLE_S = 75.0  # between two requests on a connection
LINGERING_S = 5.0  # for the rest of a refused body: a client that is cut off while it sends does not read the answer
READ_BUFFER_BYTES = 1 << 16  # of a body that nobody has read yet; the transport pauses at twice that


class HttpRunner(web.AppRunner):
    """An `AppRunner` for strangers' requests."""

    def __init__(self, application: web.Application, **options: Any) -> None:
        super().__init__(
            application,
            access_log=None,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=IDLE_S,
            lingering_time=LINGERING_S,
            read_bufsize=READ_BUFFER_BYTES,
            **options,
        )
