"""How many connections there are."""

from __future__ import annotations

import asyncio
import resource
from contextlib import AsyncExitStack

import pytest

from pipeline.config.api import MAX_CONNECTIONS
from tests.workers.api.serving import FakeClient, Pieces, endpoint, get, piece, post, serving
from workers.api.runner import connections_allowed


async def test_a_connection_that_is_idle_gives_its_place_to_a_new_one() -> None:
    async with serving(endpoint(), max_connections=3) as site, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(site.connect()) for _ in range(3)]
        for wire in slow:
            await wire.send(b"GET /v1")
        await asyncio.sleep(0.1)
        assert (await site.ask(get("/v1/models"))).status == 200
        assert await slow[0].rest() == b"", "the oldest"
        await slow[2].send(get("/v1/models").removeprefix(b"GET /v1"))
        assert (await slow[2].answer()).status == 200


async def test_where_all_connections_are_busy_a_new_one_is_told_so() -> None:
    async def answer() -> Pieces:
        await asyncio.Event().wait()
        yield piece("")

    client = FakeClient(answer)
    async with serving(endpoint(client), max_connections=2) as site, AsyncExitStack() as stack:
        for _ in range(2):
            await (await stack.enter_async_context(site.connect())).send(post())
        while client.num_asked < 2:
            await asyncio.sleep(0.01)
        async with site.connect() as wire:
            answered = await wire.answer()
            assert answered.error.status == 503
            assert answered.headers["retry-after"]


def test_connections_leave_descriptors_for_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for most, connections_ in ((64, 32), (256, 128), (1024, 896), (1 << 20, MAX_CONNECTIONS)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, most=most: (most, most))
        assert connections_allowed() == connections_
