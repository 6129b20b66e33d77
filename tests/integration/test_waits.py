"""Nothing waits without end, and who can serve does.

A group dies, the launcher stands still, files vanish, starts fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.client.client import PipelineClient
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.pictures import encode, scene
from tests.servers import Server, is_alive
from tools.processes import workers_of

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)


async def ask(client: PipelineClient, question: str, sampling: SamplingParams = GREEDY) -> list[int]:
    pieces = client.generate([ChatMessage("user", question)], sampling)
    return [token async for piece in pieces for token in piece.token_ids]


async def look(client: PipelineClient, number: int) -> list[int]:
    chat = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
    pieces = client.generate(chat, GREEDY, [encode(scene(number))])
    return [token async for piece in pieces for token in piece.token_ids]


def restarts(client: PipelineClient) -> dict[str, int]:
    return {str(state.worker): state.epoch - 1 for state in client.workers if state.epoch > 1}


@contextlib.asynccontextmanager
async def kept_dead(server: Server, name: str) -> AsyncIterator[None]:
    """Whenever it comes, it is killed."""

    async def kill() -> None:
        while True:
            if (pid := workers_of(server.process.pid).get(name)) is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.05)

    killing = asyncio.create_task(kill())
    yield
    killing.cancel()
    await asyncio.gather(killing, return_exceptions=True)


@pytest.mark.timeout(240)
async def test_while_one_group_is_dead_the_other_serves() -> None:
    questions = [f"Tell me about number {number}" for number in range(4)]
    with Server("--dp", "2", "--dtype", "float32", *LIMITS) as server:
        async with PipelineClient(server.run_dir) as client:
            expected = [await ask(client, question, LONG) for question in questions]
            running = [asyncio.create_task(ask(client, question, LONG)) for question in questions]
            await asyncio.sleep(0.1)
            assert not any(task.done() for task in running)
            async with kept_dead(server, "llm.1"):
                while "llm.1" not in restarts(client):
                    await asyncio.sleep(0.01)
                new = [asyncio.create_task(ask(client, question, LONG)) for question in questions]
                async with PipelineClient(server.run_dir) as late:
                    assert await ask(late, questions[0], LONG) == expected[0], "who comes meanwhile is served"
                assert await asyncio.wait_for(asyncio.gather(*running, *new), 60) == expected * 2
                ready = {str(state.worker): state.is_ready for state in client.workers}
                assert (ready["llm.0"], ready["llm.1"]) == (True, False)
            assert client.counters["given_up"] == 0
            assert client.counters["resubmitted"] > 0
            end = time.monotonic() + 60
            while not all(state.is_ready for state in client.workers):
                assert time.monotonic() < end
                await asyncio.sleep(0.1)
            assert await ask(client, questions[1], LONG) == expected[1]
        server.children = workers_of(server.process.pid)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--dtype", "float32", *LIMITS) as made:
        yield made
        made.children = workers_of(made.process.pid)


@pytest.mark.timeout(120)
async def test_while_the_launcher_stands_still_all_is_served(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        expected = await ask(client, "Hello")
        server.process.send_signal(signal.SIGSTOP)
        try:
            end = time.monotonic() + 12
            while time.monotonic() < end:
                assert await asyncio.wait_for(ask(client, "Hello"), 10) == expected
                await asyncio.sleep(0.3)
            answer = await asyncio.to_thread(
                server.client().chat.completions.create,
                model="", messages=[{"role": "user", "content": "Hello"}], max_tokens=5,
            )  # fmt: skip
            assert answer.usage is not None
            assert not client.failure
        finally:
            server.process.send_signal(signal.SIGCONT)
        await asyncio.sleep(2)
        assert await ask(client, "Hello") == expected
        assert restarts(client) == {}


@pytest.mark.timeout(180)
async def test_what_a_cleaner_removes_from_the_run_directory_comes_back(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        expected = await look(client, 1)
        names = {entry.name for entry in server.run_dir.iterdir()}
        for entry in server.run_dir.iterdir():
            entry.unlink()
        assert await look(client, 1) == expected
        await asyncio.sleep(3)
        others = ("lock", "activity", "flight", "ranks")
        sockets = {name for name in names if name.split(".")[0] not in others}
        assert sockets <= {entry.name for entry in server.run_dir.iterdir()}
        async with PipelineClient(server.run_dir) as late:
            assert await look(late, 1) == expected
        for name in ("vit.0", "preprocess.0", "llm.0"):
            os.kill(workers_of(server.process.pid)[name], signal.SIGKILL)
            while name not in restarts(client):
                await asyncio.sleep(0.02)
            assert await asyncio.wait_for(look(client, 1), 40) == expected
        assert set(restarts(client).values()) == {1}
        assert client.counters["given_up"] == 0
    assert "was removed: bound again" in server.output


@pytest.mark.timeout(60)
def test_without_its_run_directory_the_pipeline_ends_and_says_so() -> None:
    with Server(*LIMITS, expects_failure=True) as server:
        while "Serving at" not in server.output:
            time.sleep(0.1)
        children = workers_of(server.process.pid)
        moved = server.run_dir.with_name("moved")
        server.run_dir.rename(moved)
        assert server.wait() == 1
        assert "the run directory is gone" in server.output
        assert [name for name, pid in children.items() if is_alive(pid)] == []
        moved.rename(server.run_dir)
        for entry in server.run_dir.iterdir():
            entry.unlink()


@pytest.mark.timeout(120)
async def test_a_restart_that_fails_is_tried_again_while_the_others_serve(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    weights = [(path, path.with_suffix(".away")) for path in folder.glob("*.safetensors")]
    with Server("--model", str(folder), "--dtype", "float32", *LIMITS, "--log-level", "info") as server:
        async with PipelineClient(server.run_dir) as client:
            text, picture = await ask(client, "Hello"), await look(client, 1)
            for path, away in weights:
                path.rename(away)
            os.kill(workers_of(server.process.pid)["vit.0"], signal.SIGKILL)
            while server.output.count("vit.0 exited with code 1") < 3:
                assert await ask(client, "Hello") == text
                await asyncio.sleep(0.1)
            waiting = asyncio.create_task(look(client, 2))
            await asyncio.sleep(0.5)
            for path, away in weights:
                away.rename(path)
            assert len(await asyncio.wait_for(waiting, 40)) == 12
            assert await look(client, 1) == picture
        server.children = workers_of(server.process.pid)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["vit", "llm"])
def test_who_is_ready_and_fails_before_its_first_work_ends_the_pipeline_with_its_reason(role: str) -> None:
    with Server(*LIMITS, "--fault", f"{role}:end:ready", expects_failure=True) as server:
        assert server.wait() == 1
        assert f"{role}.0 exited with code 1: InjectedFault: fault: ready" in server.output
        assert "5 starts in a row have failed" in server.output


@pytest.mark.timeout(120)
def test_who_fails_twice_before_its_first_work_and_then_does_not_serves() -> None:
    with Server(*LIMITS, "--fault", "vit:end:ready:2") as server:
        chat: Any = [{"role": "user", "content": "Hello"}]
        answer = server.client().chat.completions.create(model="", messages=chat, max_tokens=5)
        assert answer.usage is not None
        server.children = workers_of(server.process.pid)
