"""Bodies: how large, how fast, and how much memory all of them take."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import tracemalloc
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import zmq

from pipeline.config import MIB, ApiConfig
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import FinishReason
from tests.workers.api.serving import CHAT, FakeClient, Pieces, Wire, endpoint, piece, post, serving
from workers.api.bodies import BodyPace
from workers.api.budget import Budget, BudgetLease, memory_mib
from workers.api.server import ApiServer

CHUNKED = "Transfer-Encoding: chunked"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("length", [MIB + 1, 99999999999, 2**64 - 2])
async def test_a_length_above_the_limit_is_a_413_at_once(length: int) -> None:
    async with serving(endpoint(max_request_mib=1)) as site:
        assert (await site.ask(post(b"{", f"Content-Length: {length}"))).error.status == 413


async def test_chunks_are_counted_as_they_come() -> None:
    async with serving(endpoint(max_request_mib=1)) as site, site.connect() as wire:
        await wire.send(post(b"", CHUNKED))
        for _ in range(17):
            await wire.send(chunk(b" " * (MIB // 16)))
        assert (await wire.answer()).error.status == 413


async def test_a_body_in_chunks_is_read() -> None:
    async with serving(endpoint()) as site:
        assert (await site.ask(post(chunk(CHAT[:9]) + chunk(CHAT[9:]) + b"0\r\n\r\n", CHUNKED))).status == 200


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_that_comes_too_slowly_is_a_408(is_chunked: bool) -> None:
    pace = BodyPace(grace_s=0.3, bytes_per_s=1000)
    async with serving(endpoint(pace=pace)) as site, site.connect() as wire:
        await wire.send(post(b"", CHUNKED if is_chunked else "Content-Length: 50000"))

        async def drip() -> None:
            with contextlib.suppress(ConnectionError):
                while True:
                    await wire.send(chunk(b"  ") if is_chunked else b"  ")
                    await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        answer = await wire.answer()
        dripping.cancel()
        assert (answer.error.status, answer.headers["connection"]) == (408, "close")


async def test_a_body_at_a_sufficient_pace_is_taken_however_long_it_takes() -> None:
    body = CHAT + b" " * 2000
    async with (
        serving(endpoint(pace=BodyPace(grace_s=0.3, bytes_per_s=1000))) as site,
        site.connect() as wire,
    ):
        await wire.send(post(b"", f"Content-Length: {len(body)}"))
        for start in range(0, len(body), 200):
            await wire.send(body[start : start + 200])
            await asyncio.sleep(0.05)
        assert (await wire.answer()).status == 200


# The budget.


async def begin(wire: Wire, num_bytes: int) -> None:
    """A body of which one byte is not sent."""
    await wire.send(post(b" " * (num_bytes - 1), f"Content-Length: {num_bytes}"))


def with_budget(mib: int, patience_s: float = 0.2) -> tuple[ApiServer, Budget]:
    budget = Budget(mib * MIB, patience_s)
    return endpoint(budget=budget), budget


async def test_bodies_beyond_the_budget_are_refused_before_they_are_read() -> None:
    server, budget = with_budget(16)
    async with serving(server) as site, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(site.connect()) for _ in range(6)]
        for wire in wires[:3]:
            await begin(wire, 4 * MIB)
        while budget.num_bytes < 12 * MIB:
            await asyncio.sleep(0.01)
        for wire in wires[3:]:
            await wire.send(post(b"", f"Content-Length: {4 * MIB}"))  # not a byte of it
            answer = await wire.answer()
            assert answer.error.status == 503
            assert answer.headers["retry-after"]
        assert budget.num_bytes == 12 * MIB
        assert (await site.ask(post(), "127.0.0.2")).status == 200, "another client's request has its place"
        await wires[0].send(b" ")
        assert (await wires[0].answer()).error.status == 400
        assert (await site.ask(post(CHAT + b" " * 3 * MIB))).status == 200, "memory that was given back"
    assert budget.num_bytes == 0


async def test_chunks_beyond_the_budget_are_refused() -> None:
    server, budget = with_budget(8)
    async with serving(server) as site, site.connect() as wire:
        await wire.send(post(b"", CHUNKED))
        sending = asyncio.create_task(wire.send(chunk(b" " * 16 * MIB)))
        assert (await wire.answer()).error.status == 503
        sending.cancel()
    assert budget.num_bytes == 0


async def test_a_request_waits_for_memory_that_is_given_back_soon() -> None:
    server, budget = with_budget(4, patience_s=5)
    async with serving(server) as site, site.connect() as wire:
        await begin(wire, 3 * MIB)
        while budget.num_bytes < 3 * MIB:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(site.ask(post(CHAT + b" " * MIB)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await wire.send(b" ")
        assert (await waiting).status == 200


async def test_requests_that_wait_for_the_pipeline_count() -> None:
    budget = Budget(MIB, 0.1)
    server = endpoint(is_ready=False, budget=budget)
    async with serving(server) as site, AsyncExitStack() as stack:
        for _ in range(3):
            await (await stack.enter_async_context(site.connect())).send(post())
        while server.num_waiting < 3:
            await asyncio.sleep(0.01)
        assert (await site.ask(post())).error.status == 503
        assert budget.num_bytes > 0


async def test_media_are_in_memory_once() -> None:
    """Neither the body, nor what was decoded from it, beside the frames that are sent."""
    is_asked, go_on = asyncio.Event(), asyncio.Event()

    async def answer() -> Pieces:
        is_asked.set()
        await go_on.wait()
        yield piece("Hi", FinishReason.STOP)

    num_bytes = 24 * MIB
    url = "data:image/png;base64," + base64.b64encode(bytes(num_bytes * 3 // 4)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}]
    request = post(json.dumps({"messages": [{"role": "user", "content": content}], "n": 2}).encode())
    client = FakeClient(answer)
    async with serving(endpoint(client)) as site, site.connect() as wire:
        del url, content
        tracemalloc.start()
        try:
            sending = asyncio.create_task(wire.send(request))
            await is_asked.wait()
            await sending
            taken, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert num_bytes < taken < 1.5 * num_bytes
        assert len(client.media[0]) == num_bytes
        go_on.set()
        assert (await wire.answer()).status == 200


async def test_memory_is_not_given_back_before_the_media_are_gone() -> None:
    """A socket may have them still when the request has ended, while a worker is away."""
    budget = Budget(10)
    lease = BudgetLease(budget, "a")
    await lease.grow(6)
    frames = [memoryview(b"abc"), memoryview(b"def")]
    lease.keep(frames)
    lease.close()
    assert budget.num_bytes == 6
    frames.pop()
    await asyncio.sleep(0)
    assert budget.num_bytes == 6
    await asyncio.to_thread(frames.clear)
    await asyncio.sleep(0.01)
    assert budget.num_bytes == 0


async def test_memory_that_a_socket_holds_is_not_given_back(tmp_path: Path) -> None:
    """Its peer is a worker that is away: requests that were given up meanwhile still lie in the queue."""
    budget = Budget(4 * MIB)
    lease = BudgetLease(budget, "a")
    await lease.grow(MIB)
    frames = [memoryview(bytes(MIB))]
    lease.keep(frames)
    with zmq.Context() as context:
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"ipc://{tmp_path}/away")
        socket.send_multipart([b"message", *frames], copy=False)
        frames.clear()
        lease.close()
        await asyncio.sleep(0.1)
        assert budget.num_bytes == MIB
        socket.close()
    end = time.monotonic() + 5
    while budget.num_bytes and time.monotonic() < end:
        await asyncio.sleep(0.01)
    assert budget.num_bytes == 0


async def test_one_client_leaves_room_for_others() -> None:
    budget = Budget(100, patience_s=0)
    leases: list[BudgetLease] = []

    async def take(owner: str, num_bytes: int) -> bool:
        lease = BudgetLease(budget, owner)
        try:
            await lease.grow(num_bytes)
        except RequestError:
            return False
        leases.append(lease)
        return True

    assert sum([await take("greedy", 5) for _ in range(100)]) == 15, "three quarters"
    assert await take("modest", 15)
    assert not await take("greedy", 1)
    for lease in leases:
        lease.close()
    assert budget.num_bytes == 0
    assert await take("greedy", 75)


async def test_turns_are_by_owner_and_a_waiter_that_leaves_takes_nothing() -> None:
    budget = Budget(100, patience_s=5)
    first = BudgetLease(budget, "a")
    await first.grow(50)
    wanted = (("a", 60), ("a", 1), ("b", 9))
    large, small, other = (
        asyncio.create_task(BudgetLease(budget, owner).grow(size)) for owner, size in wanted
    )
    await asyncio.wait_for(other, 1)
    await asyncio.sleep(0.01)
    assert not small.done(), "behind the large one of its owner"
    large.cancel()
    await asyncio.wait_for(small, 1)
    first.close()
    assert budget.num_bytes == 10


def test_the_default_budget_has_room_for_some_of_the_largest_bodies() -> None:
    assert 4 * 64 <= memory_mib(ApiConfig()) <= 16 * 64
    assert memory_mib(ApiConfig(api_memory_mib=200)) == 200
    with pytest.raises(ValueError, match="api_memory_mib must be at least 128"):
        ApiConfig(api_memory_mib=100)
