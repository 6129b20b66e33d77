"""The route of the lanes: who is served, when the launcher is told, and what becomes of a slow page."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import AsyncExitStack
from typing import Any

import pytest

from pipeline.config import ApiKey
from pipeline.wire.control import WorkerState
from pipeline.wire.lanes import LaneSpan, WorkDone
from tests.fakes import LLM_0
from tests.workers.api.serving import FakeClient, Pieces, Site, Wire, endpoint, get, piece, post, serving
from workers.api import lane_viewer
from workers.api import lanes as module
from workers.api.lanes import ANNOUNCED_S, KEPT_FOR_ADMINS, MAX_OF_A_TENANT, MAX_VIEWERS
from workers.api.launcher_requests import LauncherRequests
from workers.api.server import ApiServer

KEYS = (ApiKey("alice", "of-alice"), ApiKey("bob", "of-bob"))
ALICE, BOB, ADMIN = (f"Authorization: Bearer {key}" for key in ("of-alice", "of-bob", "of-admin"))
EVENTS = "/lanes/events"


class Asked:
    """An endpoint, and for how long it says that somebody looks."""

    def __init__(self, client: FakeClient | None = None, **options: Any) -> None:
        self.watched: list[float] = []
        client = client or FakeClient()
        client.workers = (WorkerState(LLM_0, 1, True),)
        self.server: ApiServer = endpoint(
            client, launcher=LauncherRequests(watch=self.watched.append), **options
        )

    def work(self, *request_ids: str, amount: int = 1) -> None:
        span = LaneSpan("decode", 100.0, 100.1, request_ids, amount)
        self.server.lanes.on_work(WorkDone(sender=LLM_0, epoch=1, spans=(span,)))


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL_S", 0.01)
    monkeypatch.setattr(lane_viewer, "SILENCE_S", 0.1)


async def event(wire: Wire, name: str) -> Any:
    """The next one of this name."""
    while True:
        line = await asyncio.wait_for(wire.reader.readuntil(b"\n"), 10)
        if line == f"event: {name}\n".encode():
            data = await asyncio.wait_for(wire.reader.readuntil(b"\n"), 10)
            return json.loads(data.removeprefix(b"data: "))


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_while_nobody_looks_the_launcher_is_told_nothing() -> None:
    asked = Asked()
    async with serving(asked.server) as site:
        await site.ask(post())
        asked.work("a")
    assert asked.watched == []


async def test_the_launcher_is_told_until_the_last_page_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_EVERY_S", 0.05)
    asked = Asked()
    async with serving(asked.server) as site:
        async with site.connect() as first:
            await first.send(get(EVENTS))
            assert (await first.head())[0] == 200
            async with site.connect() as second:
                await second.send(get(EVENTS))
                lanes = await event(second, "lanes")
            assert lanes["lanes"] == [{"worker": "llm.0", "epoch": 1, "is_ready": True}]
            assert (lanes["sees"], lanes["kill"]) == ("all", "off")
            await until(lambda: len(asked.watched) > 3)
            assert set(asked.watched) == {ANNOUNCED_S}
        await until(lambda: asked.watched[-1] == 0.0)
        num_told = len(asked.watched)
        await asyncio.sleep(0.2)
        assert len(asked.watched) == num_told


@pytest.mark.parametrize(
    ("header", "status"),
    [((), 401), (("Authorization: Bearer wrong",), 401), ((ALICE,), 200), ((ADMIN,), 200)],
)
async def test_who_is_served_where_keys_are_in_use(header: tuple[str, ...], status: int) -> None:
    asked = Asked(named_keys=KEYS, admin_key="of-admin")
    async with serving(asked.server) as site, site.connect() as wire:
        await wire.send(get(EVENTS, *header))
        assert (await wire.head())[0] == status


async def looking(site: Site, wire: Wire, *headers: str) -> Any:
    """What the page is told first."""
    await wire.send(get(EVENTS, *headers))
    return await event(wire, "lanes")


async def test_a_tenant_sees_its_own_request_and_an_administrator_all() -> None:
    told = asyncio.Event()

    async def answer() -> Pieces:
        yield piece("Hi")
        await told.wait()

    client = FakeClient(answer)
    asked = Asked(client, named_keys=KEYS, admin_key="of-admin")
    async with (
        serving(asked.server) as site,
        site.connect() as alice,
        site.connect() as bob,
        site.connect() as admin,
        site.connect() as request,
    ):
        assert (await looking(site, alice, ALICE))["kill"] == "with key"
        assert (await looking(site, bob, BOB))["sees"] == "own"
        lanes = await looking(site, admin, ADMIN)
        assert (lanes["sees"], lanes["kill"]) == ("all", "allowed")
        await request.send(post(json.dumps({"messages": [], "stream": True}).encode(), ALICE))
        await until(lambda: client.num_asked == 1)
        request_id = client.options["request_id"]
        asked.work(request_id, "of-a-direct-client", amount=5)
        own, others, everything = [await event(wire, "work") for wire in (alice, bob, admin)]
        told.set()
    assert own["requests"] == {"1": {"id": request_id, "is_mine": True}}
    assert own["work"]["llm.0"][0][3:5] == [[1, 0], 0]
    assert "requests" not in others
    assert others["work"]["llm.0"][0][3:5] == [[0], 0]
    assert everything["requests"]["2"] == {"id": "of-a-direct-client", "is_mine": False}
    assert everything["work"]["llm.0"][0][3:5] == [[1, 2], 5]


@pytest.mark.parametrize(("admin_key", "num_kept"), [("", 0), ("of-admin", KEPT_FOR_ADMINS)])
async def test_too_many_pages_are_refused(admin_key: str, num_kept: int) -> None:
    """Of one tenant, here an address, and at all; some places are kept for who has the admin key."""
    asked = Asked(admin_key=admin_key)
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(asked.server))
        for number in range(MAX_VIEWERS - num_kept):
            local = f"127.0.0.{2 + number // MAX_OF_A_TENANT}"
            await looking(site, await stack.enter_async_context(site.connect(local)))
            if number == MAX_OF_A_TENANT - 1:
                assert (await site.ask(get(EVENTS), local)).status == 429
        assert (await site.ask(get(EVENTS), "127.0.0.99")).status == 429
        if admin_key:
            await looking(site, await stack.enter_async_context(site.connect("127.0.0.99")), ADMIN)
    assert asked.watched[-1] == 0.0


async def test_a_page_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for it is bounded all the while, and nobody else waits."""
    monkeypatch.setattr(module, "SLOW_S", 0.3)
    asked = Asked()
    async with serving(asked.server) as site:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((site.host, site.port))
            slow.sendall(get(EVENTS))
            await until(lambda: asked.watched)
            async with asyncio.timeout(20):
                while asked.watched[-1] != 0.0:
                    for _ in range(200):
                        asked.work(*(f"request-{index}" for index in range(60)))
                    await asyncio.sleep(0.01)
        assert (await site.ask(get("/health"))).status == 200


async def test_a_page_learns_that_the_endpoint_retires() -> None:
    asked = Asked()
    async with serving(asked.server) as site, site.connect() as wire:
        await looking(site, wire)
        asked.server.is_retiring = True
        assert (await wire.rest()).endswith(b"0\r\n\r\n"), "the stream ends in order"
        assert asked.watched[-1] == 0.0


async def test_a_head_of_the_events_is_refused() -> None:
    """It would never end."""
    async with serving(Asked().server) as site, site.connect() as wire:
        await wire.send(get(EVENTS).replace(b"GET", b"HEAD"))
        assert (await wire.head())[0] == 405
