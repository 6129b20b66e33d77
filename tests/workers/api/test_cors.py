"""Web pages of other origins, in a browser."""

from __future__ import annotations

import pytest

from pipeline.config import ApiConfig
from tests.workers.api.serving import CHAT, STREAMED_CHAT, endpoint, get, post, serving

PAGE, EVIL = "https://page.example", "https://evil.example"


def preflight(origin: str, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    asked = ("Access-Control-Request-Method: POST", f"Origin: {origin}", *headers)
    return get(path, *asked).replace(b"GET", b"OPTIONS", 1)


async def test_a_preflight_needs_no_key() -> None:
    async with serving(endpoint(allowed_origins=(PAGE,), api_key=("secret",))) as site:
        wanted = "authorization,content-type,x-stainless-os"
        answer = await site.ask(preflight(PAGE, f"Access-Control-Request-Headers: {wanted}"))
        assert (answer.status, answer.body) == (204, b"")
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.headers["access-control-allow-headers"] == wanted
        assert {"POST", "DELETE"} <= set(answer.headers["access-control-allow-methods"].split(", "))
        assert answer.headers["access-control-max-age"]
        assert answer.headers["vary"] == "Origin"
        assert "access-control-allow-credentials" not in answer.headers
        answer = await site.ask(preflight(PAGE, path="/v1/nothing"))
        assert answer.status == 204
        assert "Authorization" in answer.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(CHAT, f"Origin: {PAGE}", "Authorization: Bearer secret"), 200),
        (post(STREAMED_CHAT, f"Origin: {PAGE}", "Authorization: Bearer secret"), 200),
        (post(CHAT, f"Origin: {PAGE}"), 401),
        (post(b"{", f"Origin: {PAGE}", "Authorization: Bearer secret"), 400),
        (get("/v1/nothing", f"Origin: {PAGE}", "Authorization: Bearer secret"), 404),
        (post(CHAT, f"Origin: {PAGE}", "Authorization: Bearer secret", path="/v1/models"), 405),
    ],
)
async def test_every_answer_may_be_read_by_a_page_of_an_allowed_origin(
    request_bytes: bytes, status: int
) -> None:
    server = endpoint(allowed_origins=(PAGE,), api_key=("secret",))
    async with serving(server) as site, site.connect() as wire:
        await wire.send(request_bytes)
        found, headers = await wire.head()
        assert (found, headers["access-control-allow-origin"], headers["vary"]) == (status, PAGE, "Origin")
        assert "X-Request-Id" in headers["access-control-expose-headers"]


async def test_pages_of_other_origins_may_read_nothing() -> None:
    async with serving(endpoint(allowed_origins=(PAGE,))) as site:
        assert (await site.ask(preflight(EVIL))).error.status == 403
        for request in (preflight(EVIL), get("/v1/models", f"Origin: {EVIL}")):
            headers = (await site.ask(request)).headers
            assert "access-control-allow-origin" not in headers
            assert headers["vary"] == "Origin", "a cache must not give this answer to an allowed page"


async def test_any_origin_may_be_allowed() -> None:
    async with serving(endpoint(allowed_origins=("*",))) as site:
        for request in (preflight(EVIL), get("/v1/models", "Origin: null")):
            assert (await site.ask(request)).headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-origin" not in (await site.ask(get("/v1/models"))).headers


async def test_without_the_option_there_is_no_sharing() -> None:
    async with serving(endpoint()) as site:
        answer = await site.ask(preflight(PAGE))
        assert answer.error.status == 405
        assert "POST" in answer.headers["allow"]
        assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValueError, match="allowed_origins"):
        ApiConfig(allowed_origins=(origin,))


SIMPLE_TYPES = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")


@pytest.mark.parametrize("kind", [*SIMPLE_TYPES, "text/json", "application/jsonp", "x/application/json"])
async def test_what_a_page_may_send_without_asking_is_no_request_to_the_model(kind: str) -> None:
    async with serving(endpoint()) as site:
        answer = await site.ask(post(CHAT, f"Content-Type: {kind}", f"Origin: {EVIL}"))
        assert answer.error.status == 415
        assert "application/json" in answer.error.message
        without = post(CHAT, f"Origin: {EVIL}").replace(b"Content-Type: application/json\r\n", b"")
        assert (await site.ask(without)).error.status == 415
        chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CHAT), CHAT)
        assert (
            await site.ask(post(chunked, f"Content-Type: {kind}", "Transfer-Encoding: chunked"))
        ).status == 415


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/vnd.api+json"],
)
async def test_json_has_several_types(kind: str) -> None:
    async with serving(endpoint()) as site:
        assert (await site.ask(post(CHAT, f"Content-Type: {kind}"))).status == 200


async def test_a_wrong_path_is_told_before_a_wrong_type() -> None:
    """The client of another service is to learn that it is not served here."""
    async with serving(endpoint()) as site:
        form = "Content-Type: multipart/form-data; boundary=x"
        assert (await site.ask(post(b"x", form, path="/v1/audio/transcriptions"))).error.status == 404
