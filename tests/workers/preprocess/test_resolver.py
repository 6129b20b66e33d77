"""Names become addresses that may be had, each within its deadline, whatever others wait for."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from pipeline.config import PreprocessConfig
from pipeline.wire.errors import RequestError
from tests.workers.preprocess.hosts import host, reply
from tests.workers.preprocess.name_servers import AAAA, A, NameServer, name_server
from workers.preprocess import resolver as resolver_module
from workers.preprocess.download_turns import Asker
from workers.preprocess.fetch import Fetcher
from workers.preprocess.resolver import MediaResolver, is_public

NAMES = {
    "public.test": ["93.184.216.34", "2606:2800:220:1::1"],
    "private.test": ["10.0.0.1", "127.0.0.1", "fc00::1", "::ffff:192.168.0.1", "64:ff9b::7f00:1"],
    "mixed.test": ["169.254.169.254", "93.184.216.35", "::1"],
    "v6.test": ["2606:2800:220:1::2"],
    "loopback.test": ["127.0.0.1"],
}


@contextlib.asynccontextmanager
async def resolving(server: NameServer, allow_private: bool = False) -> AsyncIterator[MediaResolver]:
    resolver = MediaResolver(allow_private, [server.address])
    try:
        yield resolver
    finally:
        await resolver.close()


@contextlib.asynccontextmanager
async def fetching(server: NameServer, **options: Any) -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(PreprocessConfig(**options), [server.address])
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def end(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def answer(_: str, writer: asyncio.StreamWriter) -> None:
    writer.write(reply())


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Preprocess runs on uvloop; c-ares calls into either loop from a thread of its own."""

    def run_test(test: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            await test()

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())

    return run_test


def test_addresses_of_both_kinds_and_only_those_that_may_be_had(run: Callable[..., None]) -> None:
    async def test() -> None:
        async with (
            name_server(NAMES) as server,
            resolving(server) as public,
            resolving(server, True) as private,
        ):
            for name, addresses in NAMES.items():
                found = await private.resolve(name, 80)
                expected = {ipaddress.ip_address(address) for address in addresses}
                assert {ipaddress.ip_address(result["host"]) for result in found} == expected
                assert {(result["hostname"], result["port"]) for result in found} == {(name, 80)}
            found = await public.resolve("public.test")
            assert {result["host"] for result in found} == set(NAMES["public.test"])
            assert [result["host"] for result in await public.resolve("mixed.test")] == ["93.184.216.35"]
            (v6,) = await public.resolve("v6.test")
            assert (v6["host"], v6["family"]) == ("2606:2800:220:1::2", socket.AF_INET6)
            for name in ("private.test", "loopback.test", "localhost"):
                with pytest.raises(OSError, match="no address that may be"):
                    await public.resolve(name)
            assert {("public.test", A), ("public.test", AAAA)} <= set(server.asked)

    run(test)


def test_names_that_are_not_there_are_refused_at_once(run: Callable[..., None]) -> None:
    too_long = ("x" * 64 + ".test", ("y" * 60 + ".") * 5 + "test")
    names = ("missing.test", "broken.test", "a..b", "-", "a b.test", *too_long)

    async def test() -> None:
        async with name_server(NAMES) as server, resolving(server, True) as resolver:
            for name in names:
                start = time.monotonic()
                with pytest.raises(OSError, match="cannot be resolved"):
                    await resolver.resolve(name)
                assert time.monotonic() - start < 2.0, name

    run(test)


def test_silent_names_delay_nobody_and_end_at_their_deadline(
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resolver_module, "LOOKUP_TIMEOUT_S", 1.5)

    async def test() -> None:
        async with name_server(NAMES) as server:
            async with resolving(server) as resolver:
                start = time.monotonic()
                silent = [asyncio.create_task(resolver.resolve(f"{n}.silent.test")) for n in range(64)]
                await asyncio.sleep(0.1)
                asked = time.monotonic()
                assert await resolver.resolve("public.test")
                assert time.monotonic() - asked < 0.9, "one lost datagram at most"
                errors = await asyncio.gather(*silent, return_exceptions=True)
                assert 1.4 < time.monotonic() - start < 3.0
                assert {str(error)[:35] for error in errors} == {"the name servers have not answered "}
                start = time.monotonic()
            assert time.monotonic() - start < 0.5, "closed at once, though c-ares still asks"
            assert not resolver._lookups

    run(test)


def test_a_late_answer_counts_until_the_deadline(run: Callable[..., None]) -> None:
    """Beside quick answers c-ares gives up after 0.75 s, if it is asked once."""

    async def test() -> None:
        quick = {f"quick{number}.test": ["93.184.216.34"] for number in range(20)}
        async with name_server({**NAMES, **quick}) as server, resolving(server) as resolver:
            for name in quick:
                await resolver.resolve(name)
            server.late["public.test"] = 2.0
            lookup = asyncio.create_task(resolver.resolve("public.test"))
            await asyncio.sleep(2.0)
            server.late.clear()
            assert await lookup

    run(test)


def test_who_leaves_leaves_nothing_behind(run: Callable[..., None]) -> None:
    async def test() -> None:
        async with name_server(NAMES) as server, resolving(server) as resolver:
            silent = [asyncio.create_task(resolver.resolve(f"{n}.silent.test")) for n in range(8)]
            await asyncio.sleep(0.1)
            await end(silent)
            assert len(resolver._lookups) == 8, "c-ares cannot forget one"
            await asyncio.wait(list(resolver._lookups), timeout=10.0)
            await asyncio.sleep(0)
            assert not resolver._lookups, "they end by themselves"

    run(test)


def test_their_number_is_bounded(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver_module, "MAX_LOOKUPS", 8)

    async def test() -> None:
        async with name_server(NAMES) as server, resolving(server) as resolver:
            silent = [asyncio.create_task(resolver.resolve(f"{n}.silent.test")) for n in range(8)]
            await asyncio.sleep(0.1)
            with pytest.raises(OSError, match="too many"):
                await resolver.resolve("public.test")
            await end(silent)

    run(test)


def test_the_hosts_file_is_read(run: Callable[..., None]) -> None:
    lines = [line.partition("#")[0].split() for line in Path("/etc/hosts").read_text().splitlines()]
    names = [(line[1], line[0]) for line in lines if len(line) > 1 and "localhost" not in line[1]]
    if not names:
        pytest.skip("/etc/hosts names no host but localhost")
    name, address = names[0]

    async def test() -> None:
        async with name_server({}) as server, resolving(server, True) as resolver:
            assert address in [result["host"] for result in await resolver.resolve(name)]
            assert not server.asked

    run(test)


def test_media_of_a_name_come_while_others_names_are_silent(run: Callable[..., None]) -> None:
    async def test() -> None:
        async with (
            name_server(NAMES) as server,
            host(answer) as served,
            fetching(server, allow_private_media=True) as fetcher,
        ):
            silent = [asyncio.create_task(fetcher.fetch(f"http://{n}.silent.test/x", "")) for n in range(16)]
            await asyncio.sleep(0.1)
            start = time.monotonic()
            url = f"http://loopback.test:{served.port}/x"
            assert (await fetcher.fetch(url, "", None, Asker("tenant", "other"))).data == b"picture"
            assert time.monotonic() - start < 1.0
            assert served.header("Host") == f"loopback.test:{served.port}"
            await end(silent)

    run(test)


def test_a_name_with_a_private_address_reaches_nothing(run: Callable[..., None]) -> None:
    async def test() -> None:
        async with name_server(NAMES) as server, host(answer) as served, fetching(server) as fetcher:
            with pytest.raises(RequestError, match="cannot be reached"):
                await fetcher.fetch(f"http://loopback.test:{served.port}/x", "")
            assert not served.heads
            assert ("loopback.test", A) in server.asked

    run(test)


def test_public_addresses() -> None:
    assert is_public("93.184.216.34")
    assert is_public("2606:2800:220:1::1")
    local = ("192.168.1.1", "100.64.0.1", "fe80::1%eth0", "fc00::1", "224.0.0.1", "255.255.255.255", "x")
    carrying_ipv4 = ("64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1", "2001:0:1::")
    assert not any(map(is_public, (*local, *carrying_ipv4)))
