"""The lanes through a real pipeline: all roles tell of their work while somebody looks, streams survive."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from pipeline.transport.sockets import Sockets
from pipeline.wire.topology import CONTROL
from tests.integration.conftest import LIMITS
from tests.integration.test_reload import stream_text
from tests.pictures import encode, scene
from tests.servers import Server
from tools.processes import workers_of

ADMIN = {"Authorization": "Bearer secret"}
KINDS = {
    "preprocess.0": {"fetch", "tokenise", "prepare", "decode picture"},
    "vit.0": {"encode"},
    "llm.0": {"prefill", "decode"},
}
PATIENCE_S = 60


class Page:
    """Reads the events as a page does."""

    def __init__(self) -> None:
        self.lanes: list[dict[str, Any]] = []  # each state of the lanes
        self.work: dict[str, list[list[Any]]] = {}
        self.ids: dict[int, str] = {}
        self.num_bytes = 0

    async def read(self, lines: AsyncIterator[bytes]) -> None:
        async for line in lines:
            self.num_bytes += len(line)
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "lanes" in event:
                    self.lanes.append({lane["worker"]: lane for lane in event["lanes"]})
                for worker, rows in event.get("work", {}).items():
                    self.work.setdefault(worker, []).extend(rows)
                for number, request in event.get("requests", {}).items():
                    self.ids[int(number)] = request["id"]

    def kinds(self, worker: str) -> set[str]:
        return {row[0] for row in self.work.get(worker, ())}


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.05)


async def is_watched(run_dir: Path) -> bool:
    """As the launcher publishes it now."""
    sockets = Sockets(run_dir, {})
    try:
        return (await sockets.async_subscriber(CONTROL).receive()).message.is_watched
    finally:
        sockets.close()


async def ask_about_a_picture(server: Server, session: aiohttp.ClientSession, number: int) -> None:
    url = "data:image/png;base64," + base64.b64encode(encode(scene(number))).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
    async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        await response.read()


async def kill(server: Server, session: aiohttp.ClientSession, worker: str) -> None:
    async with session.post(f"{server.url}/admin/kill", json={"worker": worker}, headers=ADMIN) as response:
        assert response.status == 202, await response.text()


async def messages(server: Server, session: aiohttp.ClientSession) -> float:
    """How many the endpoint has got from workers, by its metrics."""
    await asyncio.sleep(1.5)  # they are told twice a second
    async with session.get(f"{server.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vlm_lane_messages"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--admin-key", "secret", "--dtype", "float32", *LIMITS) as made:
        yield made
        made.children = workers_of(made.process.pid)


async def test_what_all_workers_do_is_shown_and_a_stream_survives_kills(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        assert not await is_watched(server.run_dir)
        expected = await stream_text(server, session, 0, 200)
        assert await messages(server, session) == 0, "nobody looks: no worker tells anything"

        page = Page()
        async with session.get(f"{server.url}/lanes/events") as response:
            reading = asyncio.create_task(page.read(response.content))
            await until(lambda: page.lanes)
            assert page.lanes[0].keys() == {"llm.0", "vit.0", "preprocess.0", "api.0"}
            await until_watched(server, True)
            stream = asyncio.create_task(stream_text(server, session, 0, 200))
            await ask_about_a_picture(server, session, 1)
            for worker, kinds in KINDS.items():
                await until(lambda worker=worker, kinds=kinds: kinds <= page.kinds(worker))
            for worker in ("llm.0", "vit.0"):
                await kill(server, session, worker)
                await until(lambda worker=worker: page.lanes[-1][worker]["epoch"] == 2)
                await until(lambda worker=worker: page.lanes[-1][worker]["is_ready"])
            num_told = len(page.work["llm.0"])
            assert await stream == expected, "it went on where it was"
            await ask_about_a_picture(server, session, 2)
            await until(lambda: len(page.work["llm.0"]) > num_told)
            reading.cancel()
        assert page.ids
        assert all(one.startswith("chatcmpl-") for one in page.ids.values())

        await until_watched(server, False)
        before = await messages(server, session)
        assert before > 0
        await stream_text(server, session, 0, 30)
        assert await messages(server, session) == before, "nobody looks any longer"


async def until_watched(server: Server, expected: bool) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await is_watched(server.run_dir) != expected:
            await asyncio.sleep(0.1)


async def test_the_endpoint_itself_can_be_killed_and_a_page_comes_back(server: Server) -> None:
    async with aiohttp.ClientSession() as session:
        page = Page()
        async with session.get(f"{server.url}/lanes/events") as response:
            reading = asyncio.create_task(page.read(response.content))
            await until(lambda: page.lanes)
            await kill(server, session, "api.0")
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(reading, PATIENCE_S)
        async with session.get(f"{server.url}/lanes/events") as response:
            again = Page()
            reading = asyncio.create_task(again.read(response.content))
            await until(lambda: again.lanes and again.lanes[-1]["api.0"]["is_ready"])
            assert again.lanes[-1]["api.0"]["epoch"] == 2
            await ask_about_a_picture(server, session, 3)
            await until(lambda: again.kinds("vit.0") == {"encode"})
            reading.cancel()
