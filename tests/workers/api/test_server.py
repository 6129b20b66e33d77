"""The endpoint at its edges: the rest is tried through a real pipeline, in tests/integration/test_http.py."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import time
import zlib
from importlib import metadata
from math import inf
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from pipeline.config import ApiKey
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import FinishReason
from tests.workers.api.serving import (
    CHAT,
    STREAMED_CHAT,
    FakeClient,
    Pieces,
    endpoint,
    get,
    piece,
    post,
    serving,
)

BOMB_MIB = 64
NUM_BOMBS = 8
LONGEST_PAUSE_S = 0.25  # of the event loop, beside bombs that would take it for seconds


async def test_who_retires_says_so_before_it_closes_a_connection() -> None:
    """Who was not told would send its next request on a connection that closes: that one would be lost."""
    server = endpoint()
    async with TestClient(TestServer(server.application())) as client:
        answer = await client.get("/v1/models")
        assert "Connection" not in answer.headers
        server.is_retiring = True
        answer = await client.get("/v1/models")
        assert answer.headers["Connection"] == "close"
        assert (await client.get("/v1/models")).status == 200


# Bodies that are not sent as they are.


def bomb() -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(BOMB_MIB)) + packer.flush()


async def longest_pause(until: asyncio.Event) -> float:
    """Of the event loop, in seconds."""
    longest, last = 0.0, time.monotonic()
    while not until.is_set():
        await asyncio.sleep(0.005)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    return longest


CODINGS = ["gzip", "deflate", "br", "zstd", "x-gzip", "GZIP", "identity, gzip", "x\xe9"]


@pytest.mark.parametrize("header", CODINGS)
async def test_an_encoded_body_is_a_415(header: str) -> None:
    client = FakeClient()
    async with serving(endpoint(client)) as site:
        answer = await site.ask(post(gzip.compress(CHAT), f"Content-Encoding: {header}"))
        assert (answer.status, client.num_asked) == (415, 0)
        assert "Content-Encoding" in answer.error.message


async def test_a_body_in_an_unknown_transfer_coding_is_a_415() -> None:
    body = gzip.compress(CHAT)
    framed = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    async with serving(endpoint()) as site:
        assert (await site.ask(post(framed, "Transfer-Encoding: gzip, chunked"))).error.status == 415


async def test_identity_is_no_encoding() -> None:
    async with serving(endpoint()) as site:
        assert (await site.ask(post(CHAT, "Content-Encoding: Identity"))).status == 200


@pytest.mark.parametrize("key", [(), ("secret",)], ids=["open", "without its key"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/v1/nothing"])
async def test_bombs_do_not_stop_the_loop(key: tuple[str, ...], path: str) -> None:
    """Not even while what is left of them is thrown away.

    The least of three rounds: the tests beside this one stop the loop, too.
    """
    request = post(bomb(), "Content-Encoding: gzip", path=path)
    pauses: list[float] = []
    async with serving(endpoint(api_key=key)) as site:
        while len(pauses) < 3 and min(pauses, default=inf) >= LONGEST_PAUSE_S:
            over = asyncio.Event()
            pause = asyncio.create_task(longest_pause(over))
            answers = await asyncio.gather(*(site.ask(request) for _ in range(NUM_BOMBS)))
            over.set()
            assert [answer.error.status for answer in answers] == [415] * NUM_BOMBS
            pauses.append(await pause)
    assert min(pauses) < LONGEST_PAUSE_S


# Errors after the head of a stream.


def failing(error: BaseException) -> FakeClient:
    async def answer() -> Pieces:
        yield piece("Hi")
        raise error

    return FakeClient(answer)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RequestError("it broke", status=503), 503),
        (RuntimeError("a bug"), 500),
        (ConnectionResetError("of something else"), 500),
        (MemoryError(), 503),
        (ExceptionGroup("several", [ValueError()]), 500),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
async def test_an_error_after_the_head_is_told_in_the_stream(
    error: BaseException,
    status: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "workers.api.server")
    async with serving(endpoint(failing(error))) as site, site.connect() as wire:
        await wire.send(post(STREAMED_CHAT))
        data = await wire.rest()
    assert data.count(b"HTTP/1.1 ") == 1, "one head"
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"x-accel-buffering: no\r\n" in data.lower(), "a proxy must not hold it back"
    assert data.endswith(b"0\r\n\r\n"), "the stream is whole"
    events = [line.removeprefix("data: ") for line in data.decode().splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == ("service_unavailable" if status == 503 else None)
    assert events[-1] == "[DONE]"


async def test_a_server_that_ends_tells_it_in_the_stream() -> None:
    async def answer() -> Pieces:
        yield piece("Hi")
        await asyncio.Event().wait()

    async with serving(endpoint(FakeClient(answer))) as site:
        wire = site.connect()
        opened = await wire.__aenter__()
        await opened.send(post(STREAMED_CHAT))
        await opened.head()
        await opened.reader.readuntil(b"Hi")
    data = await opened.rest()
    assert b"HTTP/1.1" not in data
    assert b'"code":"service_unavailable"' in data
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    await wire.__aexit__(None, None, None)


async def test_an_error_before_the_head_has_its_own_status() -> None:
    async def answer() -> Pieces:
        raise RequestError("not like that", field="messages")
        yield

    async with serving(endpoint(FakeClient(answer))) as site:
        answered = await site.ask(post(STREAMED_CHAT))
        assert (answered.error.status, answered.error.field) == (400, "messages")


# A pipeline that is not ready yet.


WAITING = {"models": get("/v1/models"), "whole": post(), "stream": post(STREAMED_CHAT)}


@pytest.mark.parametrize("name", WAITING)
async def test_requests_wait_until_the_pipeline_is_ready(name: str) -> None:
    request_bytes = WAITING[name]
    server = endpoint(is_ready=False)
    async with serving(server) as site, site.connect() as wire:
        await wire.send(request_bytes)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wire.reader.read(1), 0.3)
        assert (await site.ask(get("/health"))).error.status == 503
        assert (await site.ask(get("/ready"))).status == 503
        assert (await site.ask(get("/metrics"))).status == 200
        server.set_ready()
        assert (await wire.head())[0] == 200


async def test_who_waits_too_long_for_the_pipeline_is_told() -> None:
    async with serving(endpoint(is_ready=False, recovery_timeout_s=0.2)) as site:
        start = time.monotonic()
        for request in (get("/v1/models"), post()):
            answer = await site.ask(request)
            assert answer.error.status == 503
            assert answer.headers["retry-after"]
        assert time.monotonic() - start >= 0.4


async def test_who_waits_for_a_pipeline_that_ends_is_told_at_once() -> None:
    client = FakeClient()
    server = endpoint(client, is_ready=False)
    async with serving(server) as site:
        waiting = asyncio.create_task(site.ask(post()))
        while not server.num_waiting:
            await asyncio.sleep(0.01)
        client.failure = "the server has stopped: out of memory"
        server.give_up()
        assert (await waiting).error.message == client.failure


async def test_who_leaves_while_waiting_waits_no_more() -> None:
    server = endpoint(is_ready=False)
    async with serving(server) as site:
        async with site.connect() as wire:
            await wire.send(get("/v1/models"))
            while not server.num_waiting:
                await asyncio.sleep(0.01)
        while server.num_waiting:
            await asyncio.sleep(0.01)


# Keys.


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret ", 200),
        ("Bearer named", 200),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer secre\xb5", 401),
        ("Bearersecret", 401),
    ],
)
async def test_the_scheme_of_a_key_has_no_case(value: str, status: int) -> None:
    server = endpoint(api_key=("secret",), named_keys=(ApiKey("alice", "named"),))
    async with serving(server) as site:
        answer = await site.ask(get("/v1/models", f"Authorization: {value}"))
        assert answer.status == status
        if status == 401:
            assert "API key" in answer.error.message
            assert answer.error.code == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"


async def test_keys_of_one_name_are_one_client() -> None:
    keys = (ApiKey("alice", "a1"), ApiKey("alice", "a2"), ApiKey("bob", "b"))
    client = FakeClient()
    salts = []
    async with serving(endpoint(client, named_keys=keys)) as site:
        for key in ("a1", "a2", "b"):
            assert (await site.ask(post(CHAT, f"Authorization: Bearer {key}"))).status == 200
            salts.append(client.options["cache_salt"])
    assert salts[0] == salts[1] != salts[2]


async def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    async with serving(endpoint(named_keys=(ApiKey("alice", "secret"),))) as site:
        for headers, status in (
            (["X-Api-Key: secret"], 200),
            (["x-api-key: wrong"], 401),
            (["X-Api-Key: secret", "Authorization: Basic abc"], 200),
            (["X-Api-Key: secret", "Authorization: Bearer wrong"], 401),
        ):
            assert (await site.ask(get("/v1/models", *headers))).status == status


# Load.


async def test_requests_beyond_the_limit_are_a_429() -> None:
    go = asyncio.Event()

    async def answer() -> Pieces:
        await go.wait()
        yield piece("Hi", FinishReason.STOP)

    server = endpoint(FakeClient(answer), max_queued_requests=2)
    async with serving(server) as site:
        asked = [asyncio.create_task(site.ask(post())) for _ in range(2)]
        while server.num_unfinished < 2:
            await asyncio.sleep(0.01)
        assert json.loads((await site.ask(get("/load"))).body)["server_load"] == 2
        refused = await site.ask(post(b"this is not even read"))
        assert (refused.error.status, refused.error.code) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) > 0
        assert (await site.ask(get("/v1/models"))).status == 200
        go.set()
        assert [(await one).status for one in asked] == [200, 200]
        assert (await site.ask(post())).status == 200
        assert json.loads((await site.ask(get("/load"))).body)["server_load"] == 0


async def test_the_version_is_the_packages() -> None:
    async with serving(endpoint(api_key=("secret",))) as site:
        assert (await site.ask(get("/version"))).status == 401
        answer = await site.ask(get("/version", "Authorization: Bearer secret"))
        assert json.loads(answer.body) == {"version": metadata.version("vlm-pipeline")}
        assert (await site.ask(get("/ping"))).status == 200


# Names of the model.
ADAPTED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": json.loads(CHAT),
    "/v1/completions": {"prompt": "Hello"},
    "/v1/messages": {**json.loads(CHAT), "max_tokens": 4},
    "/v1/responses": {"input": "Hello"},
}


async def test_all_names_of_the_model_are_taken_and_the_first_is_shown() -> None:
    async with serving(endpoint(model_names=("m", "also-m"))) as site:
        listed = json.loads((await site.ask(get("/v1/models"))).body)["data"]
        assert [card["id"] for card in listed] == ["m", "also-m"]
        for name in ("m", "also-m"):
            body = json.dumps({**json.loads(CHAT), "model": name}).encode()
            assert json.loads((await site.ask(post(body))).body)["model"] == "m"
        error = (await site.ask(post(json.dumps({**json.loads(CHAT), "model": "also"}).encode()))).error
        assert (error.status, error.code, error.field) == (404, "model_not_found", "model")
        assert "'m', 'also-m'" in error.message


async def test_adapters_are_models_whose_parent_is_the_model() -> None:
    client = FakeClient()
    async with serving(endpoint(client, adapters=("tuned", "other"))) as site:
        listed = json.loads((await site.ask(get("/v1/models"))).body)["data"]
        shown = [(card["id"], card["root"], card["parent"]) for card in listed]
        assert shown == [("m", "m", None), ("tuned", "tuned", "m"), ("other", "other", "m")]
        assert json.loads((await site.ask(get("/v1/models/tuned"))).body)["parent"] == "m"
        for path, fields in ADAPTED.items():
            for name in ("tuned", "m", ""):
                body = json.dumps({**fields, "model": name}).encode()
                answer = await site.ask(post(body, path=path))
                assert json.loads(answer.body)["model"] == (name or "m"), path
                assert client.options["adapter"] == ("tuned" if name == "tuned" else ""), path
        error = (await site.ask(post(json.dumps({**json.loads(CHAT), "model": "tune"}).encode()))).error
        assert (error.status, error.code, error.field) == (404, "model_not_found", "model")
        assert "'m', 'tuned', 'other'" in error.message
