"""Paths as clients write them."""

from __future__ import annotations

import json

import pytest

from tests.workers.api.serving import CHAT, FakeClient, endpoint, get, post, serving


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions/",
        "//v1/chat/completions",
        "/v1//chat///completions//",
        "/chat/completions",
        "//chat/completions/?a=b//c",
    ],
)
async def test_the_chat_route_has_several_spellings(path: str) -> None:
    client = FakeClient()
    async with serving(endpoint(client, api_key=("secret",))) as site:
        assert (await site.ask(post(CHAT, path=path))).status == 401
        assert (await site.ask(post(CHAT, "Authorization: Bearer secret", path=path))).status == 200
        assert (await site.ask(get(path, "Authorization: Bearer secret"))).error.status == 405
    assert client.num_asked == 1


@pytest.mark.parametrize("path", ["/models", "/v1/models/", "/models?limit=2", "//models"])
async def test_models_have_several_spellings(path: str) -> None:
    async with serving(endpoint()) as site:
        assert json.loads((await site.ask(get(path))).body)["data"][0]["id"] == "m"


@pytest.mark.parametrize("path", ["/health/", "//ping", "/metrics/"])
async def test_operators_routes_have_several_spellings(path: str) -> None:
    async with serving(endpoint(api_key=("secret",))) as site:
        assert (await site.ask(get(path))).status == (401 if "metrics" in path else 200)


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/embeddings", "/embeddings", "/v1/audio/speech", "/v1/images/generations", "/v1/moderations"),
        *("/v1/files", "/v1/batches", "/v1/rerank", "/v1/score", "/v1", "/%ff%0d%0a"),
        "/" + "x" * 9000,
    ],
)
async def test_a_404_says_what_is_served(path: str) -> None:
    async with serving(endpoint()) as site:
        for request in (post(b"{}", path=path), get(path)):
            error = (await site.ask(request)).error
            assert (error.status, error.code) == (404, "")
            assert "/v1/chat/completions" in error.message
            assert len(error.message) < 1000


async def test_head_is_served_where_get_is() -> None:
    async with serving(endpoint()) as site:
        for path in ("/v1/models", "/health", "/ping", "/version", "/metrics"):
            async with site.connect() as wire:
                await wire.send(get(path, "Connection: close").replace(b"GET", b"HEAD", 1))
                assert (await wire.head())[0] == 200
                assert await wire.rest() == b""


@pytest.mark.parametrize(("path", "allowed"), [("/v1/models", "GET,HEAD"), ("/v1/chat/completions", "POST")])
async def test_a_405_says_what_is_allowed(path: str, allowed: str) -> None:
    async with serving(endpoint()) as site:
        answer = await site.ask(get(path).replace(b"GET", b"DELETE", 1))
        assert answer.error.status == 405
        assert answer.headers["allow"] == allowed
        assert allowed in answer.error.message
