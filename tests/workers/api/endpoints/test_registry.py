"""A route is added by one file: a toy goes through the real server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import FinishReason
from tests.workers.api import toys
from tests.workers.api.serving import FakeClient, Pieces, endpoint, get, piece, post, serving
from workers.api.endpoints.registry import endpoints, routes

PATH = "/toy/completions"


def ask(**fields: Any) -> bytes:
    return post(json.dumps({"prompt": "Hi", **fields}).encode(), path=PATH)


async def two_words() -> Pieces:
    yield piece("two ")
    yield piece("words", FinishReason.STOP)


async def failing() -> Pieces:
    yield piece("two ")
    raise RequestError("it broke", status=503)


def test_the_routes_of_the_server_are_found() -> None:
    ours = {"/v1/chat/completions", "/v1/completions"}
    assert {route.path for route in routes()} >= {*ours, "/v1/models"}
    assert set(endpoints()) >= ours
    without = set(endpoints())
    with toys.installed():
        assert set(endpoints()) == {*without, PATH}


async def test_a_new_route_answers_as_a_whole() -> None:
    client = FakeClient(two_words)
    with toys.installed():
        server = endpoint(client)
    async with serving(server) as site:
        answer = await site.ask(ask(n=2, budget=7, temperature=0.5, seed=3))
        assert answer.status == 200
        assert json.loads(answer.body) == {"texts": ["two words"] * 2, "spent": 2}
    (sampling,) = client.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, sampling.n) == (7, 0.5, 3, 2)


async def test_a_new_route_streams() -> None:
    with toys.installed():
        server = endpoint(FakeClient(two_words))
    async with serving(server) as site, site.connect() as wire:
        await wire.send(ask(stream=True))
        status, headers = await wire.head()
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        said = await wire.reader.readuntil(b"0\r\n\r\n")
    events = [json.loads(line[6:]) for line in said.decode().splitlines() if line.startswith("data: ")]
    assert events == [{"at": 0, "text": "two "}, {"at": 0, "text": "words"}, {"spent": 1}]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [(ask(temperature=-1), 400), (ask(model="other"), 404), (ask(nothing=1), 400), (get(PATH), 405)],
    ids=["sampling", "model", "field", "method"],
)
async def test_a_new_route_tells_errors_in_its_own_words(request_bytes: bytes, status: int) -> None:
    with toys.installed():
        server = endpoint()
    async with serving(server) as site:
        answer = await site.ask(request_bytes)
    assert answer.status == status
    assert list(json.loads(answer.body)) == ["oops"]


async def test_a_new_route_ends_a_broken_stream_in_its_own_words() -> None:
    with toys.installed():
        server = endpoint(FakeClient(failing))
    async with serving(server) as site, site.connect() as wire:
        await wire.send(ask(stream=True))
        said = await wire.rest()
    assert said.endswith(b'data: {"oops":"it broke"}\n\n\r\n0\r\n\r\n')
