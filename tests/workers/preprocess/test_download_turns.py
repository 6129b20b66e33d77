"""Downloads of many take turns, and hosts that never answer hold up nobody but their askers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pipeline.config import PreprocessConfig
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, VideoPart
from tests.workers.preprocess.hosts import Host, host, reply
from tests.workers.preprocess.test_preprocessor import CLIENT, make_rig
from workers.preprocess import download_turns
from workers.preprocess.download_turns import (
    MAX_DOWNLOADS,
    MAX_DOWNLOADS_PER_REQUEST,
    Asker,
    BytesInFlight,
    DownloadTurns,
)
from workers.preprocess.fetch import Fetcher


class Holders:
    """Tasks that take a place and keep it until they are told."""

    def __init__(self) -> None:
        self.turns = DownloadTurns()
        self.tasks: list[asyncio.Task[None]] = []
        self.holding: list[Asker] = []
        self.served: list[Asker] = []
        self._ends: dict[Asker, list[asyncio.Event]] = {}

    async def ask(self, tenant: str, request: str, times: int = 1) -> None:
        self.tasks += [asyncio.create_task(self._hold(Asker(tenant, request))) for _ in range(times)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def _hold(self, asker: Asker) -> None:
        async with self.turns.take(asker):
            end = asyncio.Event()
            self._ends.setdefault(asker, []).append(end)
            self.holding.append(asker)
            self.served.append(asker)
            await end.wait()
            self.holding.remove(asker)

    async def finish(self, tenant: str, request: str) -> None:
        self._ends[Asker(tenant, request)].pop().set()
        for _ in range(4):
            await asyncio.sleep(0)

    def num_of(self, tenant: str, request: str = "") -> int:
        return sum(asker.tenant == tenant and request in ("", asker.request_id) for asker in self.holding)


@pytest.fixture
async def holders() -> AsyncIterator[Holders]:
    made = Holders()
    yield made
    for task in made.tasks:
        task.cancel()
    await asyncio.gather(*made.tasks, return_exceptions=True)
    made.turns.check_integrity()


async def test_a_request_has_sixteen_places_and_its_neighbour_as_many(holders: Holders) -> None:
    for request in ("a", "b", "c", "d"):
        await holders.ask("tenant", request, times=64)
        assert holders.num_of("tenant", request) == MAX_DOWNLOADS_PER_REQUEST == 16
    await holders.ask("tenant", "neighbour")
    assert holders.num_of("tenant", "neighbour") == 1


async def test_a_tenant_leaves_as_many_places_as_it_holds(holders: Holders) -> None:
    for request in range(60):
        await holders.ask("greedy", str(request), times=64)
    first = holders.num_of("greedy")
    assert MAX_DOWNLOADS // 2 - 16 <= first <= MAX_DOWNLOADS // 2
    for request in range(60):
        await holders.ask("second", str(request), times=64)
    assert (MAX_DOWNLOADS - first) // 2 - 16 <= holders.num_of("second") <= (MAX_DOWNLOADS - first) // 2
    for tenant in range(16):
        await holders.ask(f"small {tenant}", "r")
        assert holders.num_of(f"small {tenant}") == 1, "there is always room for one more"


async def test_a_free_place_goes_to_the_least(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_turns, "MAX_DOWNLOADS", 4)
    for tenant in "abcd":
        await holders.ask(tenant, "r", times=9)
    assert [asker.tenant for asker in holders.served] == ["a", "a", "b", "c"], "d came too late"
    await holders.finish("a", "r")
    assert holders.served[-1].tenant == "d", "a has waited longer, and holds more"
    for tenant in "bcda":
        await holders.finish(tenant, "r")
        assert holders.served[-1].tenant == tenant, "nobody else holds less"


async def test_requests_of_a_tenant_take_turns(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_turns, "MAX_DOWNLOADS", 2)
    for request in "123":
        await holders.ask("tenant", request, times=3)
    for request in "112312":
        await holders.finish("tenant", request)
    served = [asker.request_id for asker in holders.served]
    assert served == list("1123123"), "the first had its second turn coming when the others came"


async def test_who_leaves_takes_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while it waits, in the very moment of its turn, and after it."""
    monkeypatch.setattr(download_turns, "MAX_DOWNLOADS", 2)
    turns, order = DownloadTurns(), []

    async def hold(name: str, end: asyncio.Event) -> None:
        async with turns.take(Asker("tenant", name)):
            order.append(name)
            await end.wait()

    ends = {name: asyncio.Event() for name in "abcd"}
    tasks = {name: asyncio.create_task(hold(name, end)) for name, end in ends.items()}
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert order == ["a"]
    ends["a"].set()
    await asyncio.sleep(0)  # a hands its place to b, whose task has yet to run
    tasks["b"].cancel()
    tasks["c"].cancel()
    await asyncio.gather(*(tasks[name] for name in "abc"), return_exceptions=True)
    await asyncio.sleep(0)
    assert order == ["a", "d"]
    tasks["d"].cancel()
    await asyncio.gather(tasks["d"], return_exceptions=True)
    turns.check_integrity()


def test_bytes_of_a_tenant_leave_room_for_others() -> None:
    in_flight = BytesInFlight(100)
    with contextlib.ExitStack() as stack:
        names = ("greedy", "second", "third")
        greedy, second, third = (stack.enter_context(in_flight.counted(name)) for name in names)
        assert greedy(50)
        assert not greedy(1)
        assert second(25)
        assert not second(1)
        assert third(12)
    with in_flight.counted("third") as count:
        assert count(50), "what has ended does not count"


# On loopback, beside hosts that never answer.


async def answer(target: str, writer: asyncio.StreamWriter) -> None:
    if target.startswith("/silent"):
        await asyncio.Event().wait()
    if target.startswith("/drip"):
        writer.write(reply(bytes(1 << 20))[: 600 << 10])
        await writer.drain()
        await asyncio.Event().wait()
    writer.write(reply())


@contextlib.asynccontextmanager
async def fetching(**options: Any) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(PreprocessConfig(allow_private_media=True, media_timeout_s=60.0, **options))
    try:
        yield fetcher
        fetcher._turns.check_integrity()
    finally:
        await fetcher.close()


@contextlib.asynccontextmanager
async def beside(
    served: Host,
    fetcher: Fetcher,
    num_requests: int,
    tenant: str,
    more: tuple[str, ...] = (),
    num_open: int = 0,
) -> AsyncIterator[None]:
    """Requests of 64 URLs that are never answered; so many are under way when it begins."""
    paths = (*(f"/silent{number}" for number in range(64)), *more)
    tasks = []
    for number in range(num_requests):
        urls = [f"{served.base}{path}?{number}" for path in paths]
        asker = Asker(tenant, str(number))
        tasks += [asyncio.create_task(fetcher.fetch(url, "", None, asker)) for url in urls]
    await asyncio.sleep(0.5)
    while served.num_open < num_open:
        await asyncio.sleep(0.01)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def seconds(fetcher: Fetcher, url: str, asker: Asker) -> float:
    """The second best of five."""
    times = []
    for number in range(5):
        start = time.monotonic()
        assert (await fetcher.fetch(f"{url}?{number}", "", None, asker)).data == b"picture"
        times.append(time.monotonic() - start)
    return sorted(times)[1]


@pytest.mark.parametrize(("num_requests", "neighbour"), [(4, "tenant"), (4, "other"), (24, "other")])
async def test_silent_hosts_do_not_delay_a_neighbour(num_requests: int, neighbour: str) -> None:
    async with host(answer) as served, fetching() as fetcher:
        asker = Asker(neighbour, "neighbour")
        quiet = await seconds(fetcher, f"{served.base}/picture", asker)
        most = min(num_requests * MAX_DOWNLOADS_PER_REQUEST, MAX_DOWNLOADS // 2)
        async with beside(served, fetcher, num_requests, "tenant", num_open=most - 16):
            assert served.num_open <= most + 1
            loaded = await seconds(fetcher, f"{served.base}/picture", asker)
        assert loaded < 10 * quiet + 0.1, f"{loaded:.3f} s beside them, {quiet:.3f} s alone"


async def test_nobody_waits_for_a_download_that_waits_for_its_turn() -> None:
    """The neighbour's URL is also the last of a request whose other hosts never answer."""
    async with host(answer) as served, fetching() as fetcher:
        async with beside(served, fetcher, 1, "tenant", ("/picture",)), asyncio.timeout(2.0):
            fetched = await fetcher.fetch(f"{served.base}/picture?0", "", None, Asker("tenant", "neighbour"))
        assert fetched.data == b"picture"


async def test_unfinished_media_are_limited_and_leave_room() -> None:
    async with host(answer) as served, fetching(max_open_media_mib=1, max_media_mib=1) as fetcher:
        task = asyncio.create_task(fetcher.fetch(f"{served.base}/drip/0", "", None, Asker("greedy", "a")))
        while fetcher._in_flight._by_tenant["greedy"] < 590 << 10:
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="too many media are being downloaded") as refusal:
            await fetcher.fetch(f"{served.base}/drip/1", "field", None, Asker("greedy", "b"))
        assert (refusal.value.info.status, refusal.value.info.field) == (503, "field")
        fetched = await fetcher.fetch(f"{served.base}/picture", "", None, Asker("other", "c"))
        assert fetched.data == b"picture"
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.1)
        assert not fetcher._in_flight._by_tenant


async def test_preprocess_says_on_whose_behalf() -> None:
    askers: list[Asker] = []

    async def fetch(url: str, field: str, validators: object, asker: Asker) -> None:
        askers.append(asker)
        await asyncio.sleep(0.05)
        raise RequestError("no", field=field)

    async with make_rig(1) as rig:
        rig.core.fetcher.fetch = rig.core.fetcher.fetch_file = fetch
        parts = (ImagePart(url="http://a.test/x"), VideoPart(url="http://a.test/y"))
        for request_id in ("one", "two"):
            rig.submit(request_id, messages=(ChatMessage("user", parts),))
        await rig.settle()
        assert sorted(askers) == [
            Asker(f"client:{CLIENT.hex()}", name) for name in ("one", "one", "two", "two")
        ]
        for request_id in ("one", "two"):
            rig.end(request_id)
