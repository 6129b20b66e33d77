"""The endpoint at its end: what the others need is tried through a real pipeline, in tests/integration/test_http.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from aiohttp.test_utils import TestClient, TestServer

from pipeline.config import ApiConfig
from workers.api.server import ApiServer


async def test_who_retires_says_so_before_it_closes_a_connection() -> None:
    """Who was not told would send its next request on a connection that closes: that one would be lost."""
    server = ApiServer(ApiConfig(), cast(Any, SimpleNamespace(failure="", is_draining=False)), "m", cast(Any, None))
    async with TestClient(TestServer(server.application())) as client:
        answer = await client.get("/v1/models")
        assert "Connection" not in answer.headers
        server.is_retiring = True
        answer = await client.get("/v1/models")
        assert answer.headers["Connection"] == "close"
        assert (await client.get("/v1/models")).status == 200
