"""Workers are replaced on request, and with them the weights where the folder has new ones."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from pipeline.client.client import PipelineClient
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.pictures import encode, scene
from tests.servers import Server, is_alive
from tools.processes import workers_of

NUM_TOKENS = 150


async def stream_text(server: Server, session: aiohttp.ClientSession, number: int, max_tokens: int) -> str:
    """The text of one streamed answer; fails with whatever is no orderly end."""
    chat = [{"role": "user", "content": f"Tell me about number {number}"}]
    body = {"messages": chat, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    texts: list[str] = []
    async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                texts += [choice["delta"].get("content", "") for choice in event["choices"]]
            elif line.startswith(b"data: [DONE]"):
                return "".join(texts)
    raise AssertionError("the stream broke off")


async def test_a_reload_replaces_every_worker_and_no_request_fails() -> None:
    with Server("--admin-key", "secret", "--dtype", "float32", *LIMITS) as server:
        async with aiohttp.ClientSession() as session:
            expected = [await stream_text(server, session, number, 120) for number in range(2)]
            before = workers_of(server.process.pid)
            under_way = [
                asyncio.create_task(stream_text(server, session, number, 120)) for number in range(2)
            ]
            await asyncio.sleep(0.5)
            async with session.post(f"{server.url}/admin/reload") as refused:
                assert refused.status == 401
            async with session.post(
                f"{server.url}/admin/reload", headers={"Authorization": "Bearer secret"}
            ) as accepted:
                assert accepted.status == 202, await accepted.text()
            async with session.post(
                f"{server.url}/admin/reload", headers={"Authorization": "Bearer secret"}
            ) as again:
                assert again.status == 409
                assert "under way" in await again.text()
            end = time.monotonic() + 30
            while "reload: done" not in server.output and time.monotonic() < end:
                assert expected[0].startswith(await stream_text(server, session, 0, 20))
            assert "reload: done" in server.output
            assert await asyncio.gather(*under_way) == expected
            assert [await stream_text(server, session, number, 120) for number in range(2)] == expected
            while is_alive(before["api.0"]):  # until its connections have been idle for a while
                assert time.monotonic() < end + 10
                await asyncio.sleep(0.1)
            after = workers_of(server.process.pid)
            assert before.keys() == after.keys()
            assert [name for name in before if before[name] == after[name]] == ["server"]
            assert ": it is replaced" not in server.output, "nobody died by itself"
        server.children = after


def replace_weights(folder: Path, source: Path) -> None:
    """By a new file in the place of the old one, which who has it open goes on reading."""
    shutil.copy(source / "model.safetensors", folder / "new")
    (folder / "new").rename(folder / "model.safetensors")


class Reloadable(NamedTuple):
    """A server of `folder`, which has the files of `first` at its start."""

    server: Server
    folder: Path
    first: Path
    second: Path

    def num_reloads(self) -> int:
        return self.server.output.count("reload: done")


@pytest.fixture(scope="module")
def reloadable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloadable]:
    made = tmp_path_factory.mktemp("reloadable")
    first, second = make_checkpoint(made / "first", seed=1), make_checkpoint(made / "second", seed=2)
    folder = shutil.copytree(first, made / "model")
    with Server("--model", str(folder), "--dtype", "float32", "--admin-key", "secret", *LIMITS) as server:
        yield Reloadable(server, folder, first, second)
        server.children = workers_of(server.process.pid)


async def test_new_weights_are_loaded_and_each_request_is_answered_by_one_kind(
    reloadable: Reloadable,
) -> None:
    """Old ones are in no cache: a picture seen before, and a prompt computed before, are computed again."""
    server, second = reloadable.server, reloadable.second
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
    picture = [encode(scene(5))]

    async def answer(client: PipelineClient, num_tokens: int) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        pieces = client.generate(messages, sampling, picture)
        return [token async for piece in pieces for token in piece.token_ids]

    with Server("--model", str(second), "--dtype", "float32", *LIMITS) as other:
        async with PipelineClient(other.run_dir) as client:
            of_second = await answer(client, NUM_TOKENS)
    async with PipelineClient(server.run_dir) as client, aiohttp.ClientSession() as session:
        of_first = await answer(client, NUM_TOKENS)
        assert of_first[:8] != of_second[:8]
        under_way = [asyncio.create_task(answer(client, NUM_TOKENS)) for _ in range(3)]
        await asyncio.sleep(0.2)
        replace_weights(reloadable.folder, second)
        headers = {"Authorization": "Bearer secret"}
        async with session.post(f"{server.url}/admin/reload", headers=headers) as accepted:
            assert accepted.status == 202, await accepted.text()
        while not reloadable.num_reloads():
            under_way.append(asyncio.create_task(answer(client, 8)))
            await asyncio.sleep(0.2)
        for tokens in await asyncio.gather(*under_way):
            assert tokens in (of_first[: len(tokens)], of_second[: len(tokens)])
        assert await answer(client, NUM_TOKENS) == of_second


async def test_who_dies_after_the_weights_were_replaced_takes_the_others_along(
    reloadable: Reloadable,
) -> None:
    """Else embeddings of new weights would reach an old LLM. A request that has tokens is given up."""
    server = reloadable.server
    num_reloads = reloadable.num_reloads()
    async with PipelineClient(server.run_dir) as client:
        sampling = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
        pieces = client.generate([ChatMessage("user", "Hello")], sampling)
        await anext(pieces)
        replace_weights(reloadable.folder, reloadable.first)
        before = workers_of(server.process.pid)
        os.kill(before["vit.0"], signal.SIGKILL)
        with pytest.raises(RequestError, match="weights were replaced") as caught:
            async for _ in pieces:
                pass
        assert caught.value.info.status == 503
        while reloadable.num_reloads() == num_reloads:
            await asyncio.sleep(0.1)
        after = workers_of(server.process.pid)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {name for name in before if name.startswith(("vit", "llm"))}


async def test_a_reload_of_another_checkpoint_is_refused(reloadable: Reloadable) -> None:
    server, config = reloadable.server, reloadable.folder / "config.json"
    config.write_text(config.read_text() + "\n")
    server.process.send_signal(signal.SIGHUP)
    while "no reload: other files" not in server.output:
        await asyncio.sleep(0.05)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{server.url}/admin/reload", headers={"Authorization": "Bearer secret"}) as answer,
    ):
        assert answer.status == 409
        assert "other files than the weights have changed" in await answer.text()
    assert server.output.count("no reload: other files") == 2
