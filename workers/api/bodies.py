"""What is allowed as the body of a request."""

from __future__ import annotations

from aiohttp import web

from pipeline.errors import RequestError


def refuse_encodings(request: web.Request) -> None:
    """Raises RequestError (415) for a body that is not sent as it is.

    A compressed MiB may be a GiB, and inflating takes the event loop's time: nothing is inflated here, refused bodies
    included, so `auto_decompress` must be off where the connection is made.
    """
    for header, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        for value in request.headers.getall(header, []):
            for coding in value.split(","):
                if (name := coding.strip().lower()) not in ("", plain):
                    what = f"{header} {name[:40]!r} is not taken: send the body as it is"
                    raise RequestError(what, status=415)
