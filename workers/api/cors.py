"""Cross-origin resource sharing: lets web pages of the allowed origins call the server from a browser."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aiohttp import web

from pipeline.wire.errors import RequestError, shown

METHODS = "GET, HEAD, POST, DELETE, OPTIONS"
USUAL_HEADERS = "Authorization, Content-Type, X-Api-Key, X-Request-Id"
EXPOSED_HEADERS = "X-Request-Id, Request-Id, Retry-After, Warning"
MAX_AGE_S = "600"  # that a browser may remember the answer to a preflight
HEADER_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,2000}")


class Cors:
    """Without allowed origins nothing is added to any answer. Credentials (cookies) are never allowed."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = frozenset(allowed)

    def headers(self, request: web.Request) -> dict[str, str]:
        """For any answer, also for errors and streams."""
        if not self._allowed:
            return {}
        origin = request.headers.get("Origin", "")
        if not self._allows(origin):
            return {"Vary": "Origin"}
        return {
            "Vary": "Origin",
            "Access-Control-Allow-Origin": "*" if "*" in self._allowed else origin,
            "Access-Control-Expose-Headers": EXPOSED_HEADERS,
        }

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser that asks before it calls; None: this is another request.

        Raises RequestError for an origin that is not allowed.
        """
        asked = request.headers
        is_preflight = "Origin" in asked and "Access-Control-Request-Method" in asked
        if not self._allowed or request.method != "OPTIONS" or not is_preflight:
            return None
        if not self._allows(origin := asked["Origin"]):
            raise RequestError(f"the origin {shown(origin)} is not one of --allowed-origins", status=403)
        wanted = asked.get("Access-Control-Request-Headers", "")
        headers = {
            "Access-Control-Allow-Methods": METHODS,
            # The wildcard would not stand for Authorization.
            "Access-Control-Allow-Headers": wanted if HEADER_NAMES.fullmatch(wanted) else USUAL_HEADERS,
            "Access-Control-Max-Age": MAX_AGE_S,
        }
        if asked.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)

    def _allows(self, origin: str) -> bool:
        return bool(origin) and ("*" in self._allowed or origin in self._allowed)
