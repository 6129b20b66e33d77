"""What strangers do to connections, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Any

import pytest

from pipeline.wire.sampling import FinishReason
from tests.workers.api.serving import (
    CHAT,
    STREAMED_CHAT,
    FakeClient,
    Pieces,
    Site,
    Wire,
    endpoint,
    get,
    piece,
    post,
    serving,
)
from workers.api import connections, generation
from workers.api.connections import Patience

SHORT = Patience(head_s=0.3, idle_s=0.3, reading_s=0.5, closing_s=0.5)


async def drip(wire: Wire, data: bytes) -> None:
    """A byte now and then, as long as it is taken."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            await wire.send(bytes([byte]))
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("is_second", [False, True], ids=["first", "on an open connection"])
async def test_a_head_that_does_not_end_is_a_408(is_second: bool) -> None:
    async with serving(endpoint(), patience=SHORT) as site, site.connect() as wire:
        if is_second:
            await wire.send(get("/v1/models"))
            assert (await wire.answer()).status == 200
        dripping = asyncio.create_task(drip(wire, get("/v1/models", *["X-A: b"] * 100)))
        answer = await wire.answer()
        assert (answer.error.status, answer.headers["connection"]) == (408, "close")
        assert await wire.rest() == b""
        dripping.cancel()
        assert (await site.ask(get("/v1/models"))).status == 200


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with serving(endpoint(), patience=SHORT) as site, site.connect() as wire:
        await wire.rest(timeout_s=5)


async def test_a_connection_that_says_nothing_more_is_closed() -> None:
    async with serving(endpoint(), patience=SHORT) as site, site.connect() as wire:
        await wire.send(get("/v1/models"))
        assert (await wire.answer()).status == 200
        assert await wire.rest(timeout_s=5) == b""


@pytest.mark.parametrize("body", [CHAT, STREAMED_CHAT], ids=["whole", "stream"])
async def test_a_client_that_does_not_read_is_cut_off(body: bytes) -> None:
    """Else what is written for it stays in memory, and the request's place is not free."""
    is_over = asyncio.Event()

    async def answer() -> Pieces:
        try:
            for _ in range(200):
                yield piece("word " * 20_000)
            yield piece("", FinishReason.STOP)
        finally:
            is_over.set()

    server = endpoint(FakeClient(answer))
    async with serving(server, patience=SHORT) as site, site.connect() as wire:
        await wire.send(post(body))
        await asyncio.wait_for(is_over.wait(), 10)
        await asyncio.sleep(2)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await wire.reader.readexactly(1 << 30)
        assert server.num_handled == 0


async def test_what_is_not_read_of_an_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one prompt the client library bounds it, of several the endpoint."""
    monkeypatch.setattr(generation, "MAX_UNREAD", 100)
    body = json.dumps({"prompt": ["a", "b"], "stream": True}).encode()
    num_given = 0

    async def answer() -> Pieces:
        nonlocal num_given
        while True:
            num_given += 1
            yield piece("word " * 20_000)
            await asyncio.sleep(0)

    async with serving(endpoint(FakeClient(answer))) as site, site.connect() as wire:
        await wire.send(post(body, path="/v1/completions"))
        await wire.head()
        before = -1
        while num_given > before:
            before = num_given
            await asyncio.sleep(0.2)
        data = await wire.rest()
        assert b"not read as fast" in data
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


# Bytes that are no HTTP.

BAD_HEADS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 TLS \r\n\r\n", 400),
    "a bad method": (b"G@T / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "no version": (b"GET /nothing\r\n\r\n", 404),
    "no host": (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
    "a bad URL": (b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a bad header": (b"GET / HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
    "length and chunks": (
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400,
    ),
    "a negative length": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "a long header": (get("/v1/models", "Cookie: " + "x" * 40_000), 431),
    "a long line": (get("/v1/models?" + "x" * 40_000), 431),
    "many headers": (get("/v1/models", *(f"X-{n}: {'y' * 5000}" for n in range(100))), 431),
    "very many headers": (get("/v1/models", *["X: y"] * 1000), 400),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADS)
async def test_what_is_no_http_is_told_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, status = BAD_HEADS[name]
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(data)
        answer = await wire.answer()
        assert answer.error.status == status
        assert await wire.rest() == b"", "one answer, and the connection ends"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_headers_of_proxies_may_be_long() -> None:
    async with serving(endpoint()) as site:
        assert (await site.ask(get("/v1/models", "Cookie: " + "x" * 30_000))).status == 200


async def test_one_head_may_not_be_sent_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_HEAD_BYTES", 10_000)
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(get("/v1/models", *["X: " + "y" * 900] * 5)[:-2])
        await asyncio.sleep(0.1)
        await wire.send(b"".join(b"X: %s\r\n" % (b"y" * 900) for _ in range(10)))
        assert (await wire.answer()).error.status == 431


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdeXX", b"-1\r\n", b"ffffffffffffffffff\r\n"])
async def test_broken_chunks_are_a_400(rest: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(post(b"4\r\n{   \r\n", "Transfer-Encoding: chunked"))
        await asyncio.sleep(0.1)
        await wire.send(rest)
        assert (await wire.answer()).error.status == 400
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (get("/v1/nothing"), 404),
        (post(b"{}", path="/v1/models"), 405),
        (get("/v1/chat/completions"), 405),
        (post(b"not json"), 400),
        (b"PUT /v1/models HTTP/1.0\r\n\r\n", 405),
    ],
)
async def test_every_error_is_openais_object(request_bytes: bytes, status: int) -> None:
    async with serving(endpoint()) as site:
        answer = await site.ask(request_bytes)
        assert answer.error.status == status
        assert ("allow" in answer.headers) is (status == 405)


# Expectations.


async def expecting(site: Site, *headers: str, path: str = "/v1/chat/completions") -> int:
    """The status that comes before the body is sent."""
    async with site.connect() as wire:
        await wire.send(post(b"", *headers, path=path))
        return (await wire.head())[0]


async def test_who_leaves_as_its_answer_ends_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = connections.HttpConnection.finish_response

    async def finish_and_hear_the_end(connection: Any, *given: Any) -> Any:
        finished = await finish(connection, *given)
        connection.eof_received()
        return finished

    monkeypatch.setattr(connections.HttpConnection, "finish_response", finish_and_hear_the_end)
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(get("/ping"))
        assert (await wire.answer()).status == 200
        assert await wire.rest(5) == b""


async def test_nothing_is_read_behind_the_head_of_a_connect() -> None:
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(post().replace(b"POST", b"CONNECT", 1))
        status, headers = await wire.head()
        assert (status, headers["connection"]) == (404, "close")
        assert (await wire.rest()).count(b"HTTP/1.1") == 0


async def test_a_body_is_asked_for_when_it_will_be_taken() -> None:
    async with serving(endpoint(max_request_mib=1)) as site, site.connect() as wire:
        await wire.send(post(b"", "Expect: 100-Continue", f"Content-Length: {len(CHAT)}"))
        assert (await wire.head())[0] == 100
        await wire.send(CHAT)
        assert json.loads((await wire.answer()).body)["choices"]
        large, length = f"Content-Length: {2 << 20}", f"Content-Length: {len(CHAT)}"
        assert await expecting(site, "Expect: 100-continue", large) == 413
        assert await expecting(site, "Expect: 100-continue", length, "Content-Encoding: gzip") == 415
        assert await expecting(site, "Expect: 100-continue", length, path="/v1/nothing") == 404
        assert await expecting(site, "Expect: the-moon", length) == 417
    async with serving(endpoint(api_key=("secret",))) as site:
        assert await expecting(site, "Expect: 100-continue", length) == 401


async def test_who_does_not_wait_for_continue_need_not() -> None:
    async with serving(endpoint()) as site, site.connect() as wire:
        await wire.send(post(CHAT, "Expect: 100-continue"))
        assert (await wire.answer()).status == 200


# Clients that stop sending.


def waiting() -> tuple[FakeClient, asyncio.Event, asyncio.Event]:
    """A client of the pipeline that answers once the first event is set; the second one: the answer ended."""
    go, is_over = asyncio.Event(), asyncio.Event()

    async def answer() -> Pieces:
        try:
            yield piece("Hi")
            await go.wait()
            yield piece("", FinishReason.STOP)
        finally:
            is_over.set()

    return FakeClient(answer), go, is_over


async def final(wire: Wire) -> tuple[int, dict[str, str]]:
    """The head of the next answer; informational ones are skipped, as any client does."""
    while (head := await wire.head())[0] < 200:
        pass
    return head


@pytest.mark.parametrize("probe_s", [0.1, 5.0])
@pytest.mark.parametrize("body", [CHAT, STREAMED_CHAT], ids=["whole", "stream"])
async def test_who_has_only_stopped_sending_gets_its_answer(
    body: bytes, probe_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "PROBE_INTERVAL_S", probe_s)
    client, go, _ = waiting()
    async with serving(endpoint(client)) as site, site.connect() as wire:
        await wire.send(get("/v1/models") + post(body))
        wire.writer.write_eof()
        models = await wire.answer()
        assert models.status == 200
        asyncio.get_running_loop().call_later(1.5, go.set)
        assert (await final(wire))[0] == 200
        rest = await wire.rest()
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") or json.loads(rest)["choices"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_stops_sending_and_then_leaves_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel tells nothing of its own accord: it has told already that no more is sent."""
    monkeypatch.setattr(connections, "PROBE_INTERVAL_S", 0.2)
    client, _, is_over = waiting()
    async with serving(endpoint(client)) as site:
        async with site.connect() as wire:
            await wire.send(post(CHAT))
            wire.writer.write_eof()
            await asyncio.sleep(1)
            assert not is_over.is_set()
        await asyncio.wait_for(is_over.wait(), 5)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_who_leaves_is_noticed_before_anything_is_written(version: str) -> None:
    client, _, is_over = waiting()
    async with serving(endpoint(client)) as site:
        async with site.connect() as wire:
            await wire.send(post(CHAT).replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))
            while not client.num_asked:
                await asyncio.sleep(0.01)
        await asyncio.wait_for(is_over.wait(), 2)


async def test_who_stops_amid_its_request_has_left() -> None:
    client, *_ = waiting()
    async with serving(endpoint(client)) as site, site.connect() as wire:
        await wire.send(post(CHAT)[:-5])
        wire.writer.write_eof()
        await wire.rest()
        assert client.num_asked == 0
