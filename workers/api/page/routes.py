"""The page at `/`: its files, with headers that let a browser run these files only and load from here only.

The files hold no secret, so they need no key. The page itself asks for one, and calls the same routes as any
other client.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from pipeline.config import ApiConfig
from pipeline.wire.errors import RequestError
from workers.api.page.files import STATIC, PageFile, files_under

ROOT, PREFIX = "/", "/page/"
SETUP = f"{PREFIX}setup.json"
SAMPLES = "samples/"
QUESTIONS = "questions.json"  # beside the sample pictures: what to ask about each
INDEX = "index.html"
VIEWS = ("chat", "lanes")  # each is a module of the page
# Scripts and styles come from files only. Pictures and videos of a chat are `blob:` and `data:` URLs, which
# leave the machine as little as the rest. No code may turn a text into markup: there is no policy for it.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "media-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
    # A new version of the server is seen at once; what has not changed is not sent again.
    "Cache-Control": "no-cache",
}


def is_page(path: str) -> bool:
    return path == ROOT or path.startswith(PREFIX)


class Page:
    """`samples`: a folder with pictures that the served model can answer questions about."""

    def __init__(self, config: ApiConfig, samples: Path | None = None) -> None:
        self._config, self._samples_folder = config, samples

    @functools.cached_property
    def _files(self) -> Mapping[str, PageFile]:
        found = dict(files_under(STATIC))
        if self._samples_folder is not None:
            found |= {f"{SAMPLES}{name}": file for name, file in files_under(self._samples_folder).items()}
        return found

    @functools.cached_property
    def setup(self) -> dict[str, Any]:
        """What the page must know before it may ask the API anything."""
        questions = self._files.get(f"{SAMPLES}{QUESTIONS}")
        return {
            "needs_key": bool(self._config.keys),
            "views": [view for view in VIEWS if f"{view}.js" in self._files],
            "max_request_mib": self._config.max_request_mib,
            "samples": [] if questions is None else msgspec.json.decode(questions.body),
        }

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get(ROOT, self._index),
            web.get(SETUP, self._setup),
            web.get(f"{PREFIX}{{name:.+}}", self._file),
        ]

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return _answer(request, self._files[INDEX])

    async def _setup(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.setup, headers=HEADERS)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if (file := self._files.get(name)) is None:
            raise RequestError("the page has no such file", status=404)
        return _answer(request, file)


def _answer(request: web.Request, file: PageFile) -> web.Response:
    headers = {**HEADERS, "ETag": file.tag, "Vary": "Accept-Encoding"}
    if file.tag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = file.content_type
    if file.packed is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
        return web.Response(body=file.packed, headers={**headers, "Content-Encoding": "gzip"})
    return web.Response(body=file.body, headers=headers)
