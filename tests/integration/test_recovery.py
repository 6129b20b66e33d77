"""Workers die, hang and lose things under load; every request ends right all the same."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq
from PIL import Image

from pipeline.client.client import Piece, PipelineClient
from pipeline.process.flight_recorder import digest_of
from pipeline.transport.ends import AsyncReceiver
from pipeline.transport.sockets import Sockets
from pipeline.wire.base import ChunkKey
from pipeline.wire.clients import PROTOCOL_VERSION, Hello
from pipeline.wire.control import ControlMessage, PipelineState
from pipeline.wire.errors import RequestError
from pipeline.wire.generation import EmbeddingReady
from pipeline.wire.handles import TensorHandle
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import CONTROL, Role, WorkerId
from tests.fakes import LLM_0, PREPROCESS, VIT_0
from tests.integration.conftest import LIMITS
from tests.pictures import encode, scene
from tests.servers import Server
from tools.processes import workers_of
from tools.soak import Soak

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


async def ask(
    client: PipelineClient,
    request_id: str,
    number: int,
    sampling: SamplingParams = GREEDY,
    begun: asyncio.Event | None = None,
) -> list[int]:
    """The tokens about picture `number`. `begun` is set when the first of them has come."""
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
    pieces: list[Piece] = []
    async for piece in client.generate(messages, sampling, [encode(scene(number))], request_id):
        pieces.append(piece)
        if begun is not None:
            begun.set()
    assert pieces[-1].num_output_tokens == len([token for piece in pieces for token in piece.token_ids])
    return [token for piece in pieces for token in piece.token_ids]


async def counter(client: PipelineClient, worker: str, name: str) -> int:
    await asyncio.sleep(2.2)  # counts are told once a second, and passed on once a second
    return next(state.counters[name] for state in client.workers if str(state.worker) == worker)


def restarts(client: PipelineClient) -> dict[str, int]:
    return {str(state.worker): state.epoch - 1 for state in client.workers if state.epoch > 1}


@pytest.mark.timeout(420)
async def test_a_small_soak_with_kills_of_everybody_in_turn() -> None:
    """At full size: `python -m tools.soak --minutes 10`."""
    args = argparse.Namespace(
        seed=5,
        chats=6,
        output_tokens=30,
        clients=2,
        streams=6,
        minutes=4.0,
        kills=5,
        patience=90.0,
        interval=0.4,
        victims=["preprocess", "vit", "llm"],
    )
    with Server("--tp", "2", "--dtype", "float32", "--max-attempts", "5", *LIMITS) as server:
        found = await Soak(args, server.process.pid, server.run_dir).run()
        server.children = workers_of(server.process.pid)
    assert found.wrong == []
    assert found.left == []
    assert found.kills.keys() == {"preprocess.0", "vit.0", "vit.1", "llm.0", "llm.1"}
    assert sum(found.kills.values()) == 5
    assert found.num_resubmitted > 0
    assert found.num_answers > 20
    assert found.num_ties <= 2


@pytest.fixture(scope="module")
def steady() -> Iterator[Server]:
    """For tests that kill its workers, each of which comes back. A worker that dies again within ten seconds
    comes back later, so each test kills few."""
    with Server("--dtype", "float32", *LIMITS) as server:
        yield server
        server.children = workers_of(server.process.pid)


def restarts_since(client: PipelineClient, before: dict[str, int]) -> dict[str, int]:
    return {
        name: count - before.get(name, 0)
        for name, count in restarts(client).items()
        if count > before.get(name, 0)
    }


async def test_nobody_waits_for_the_dead_to_close_memory(steady: Server) -> None:
    """Preprocess dies, and then the ViT that would have had to say that it closed the dead one's pool."""
    async with PipelineClient(steady.run_dir) as client:
        before = restarts(client)
        expected = await ask(client, "before", 1)
        pids = workers_of(steady.process.pid)
        os.kill(pids["vit.0"], signal.SIGSTOP)
        os.kill(pids["preprocess.0"], signal.SIGKILL)
        start = time.monotonic()
        while restarts_since(client, before) != {"preprocess.0": 1}:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        assert "preprocess.0" not in workers_of(steady.process.pid), "its successor waits for the ViT"
        os.kill(pids["vit.0"], signal.SIGKILL)
        assert await ask(client, "after", 1) == expected
        assert time.monotonic() - start < 5


async def choices_of(
    client: PipelineClient, request_id: str, sampling: SamplingParams, kill: Callable[[], None] | None = None
) -> dict[int, list[int]]:
    """The tokens of each choice. `kill` is called when the first of them has ended, and others run."""
    messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("Tell me all about it.")))]
    tokens: dict[int, list[int]] = {index: [] for index in range(sampling.n)}
    ended: list[int] = []
    async for piece in client.generate(messages, sampling, [encode(scene(3))], request_id):
        assert piece.index not in ended
        tokens[piece.index] += piece.token_ids
        assert piece.num_output_tokens == len(tokens[piece.index])
        if piece.finish_reason is not None:
            ended.append(piece.index)
            if kill is not None and len(ended) == 1:
                kill()
    assert sorted(ended) == sorted(tokens), "each has one end"
    return tokens


async def test_one_choice_has_ended_when_a_worker_is_killed_and_the_others_go_on(steady: Server) -> None:
    sampling = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=70, ignore_eos=True)
    async with PipelineClient(steady.run_dir) as client:
        before = restarts(client)
        whole = await choices_of(client, "whole", sampling)
        assert len(set(map(tuple, whole.values()))) == 3
        others = {*whole[1], *whole[2]}
        at = next(at for at, token in enumerate(whole[0]) if at > 3 and token not in others)
        expected = {0: whole[0][: whole[0].index(whole[0][at]) + 1], 1: whole[1], 2: whole[2]}
        stopping = msgspec.structs.replace(sampling, stop_token_ids=(whole[0][at],))

        def kill(worker: str) -> Callable[[], None]:
            return lambda: os.kill(workers_of(steady.process.pid)[worker], signal.SIGKILL)

        for worker in ("llm.0", "preprocess.0", "vit.0"):
            assert await choices_of(client, f"kill {worker}", stopping, kill(worker)) == expected
        assert client.counters["resubmitted"] == 1, "the LLM alone was needed"
        assert restarts_since(client, before).keys() == {"llm.0", "preprocess.0", "vit.0"}


@pytest.fixture
def faulty(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server("--dtype", "float32", *LIMITS, "--hang-timeout", "3", "--fault", *request.param) as server:
        yield server
        server.children = workers_of(server.process.pid)


@pytest.mark.parametrize(
    "faulty", [("vit:kill:bad-v", "llm:kill:bad-l", "preprocess:kill:bad-p")], indirect=True
)
async def test_a_request_that_kills_a_worker_every_time_is_given_up_and_the_others_finish(
    faulty: Server,
) -> None:
    async with PipelineClient(faulty.run_dir) as client:
        expected = [await ask(client, f"before-{number}", number) for number in range(4)]
        good = [asyncio.create_task(ask(client, f"good-{number}", number)) for number in range(4)]
        bad = [
            asyncio.create_task(ask(client, name, 10 + index))
            for index, name in enumerate(("bad-v", "bad-l", "bad-p"))
        ]
        assert await asyncio.gather(*good) == expected
        for task, worker in zip(bad, ("vit.0", "llm.0", "preprocess.0"), strict=True):
            with pytest.raises(
                RequestError, match=f"given up: {worker} died while it was executing there"
            ) as caught:
                await task
            assert caught.value.info.status == 503
        assert await ask(client, "after", 0) == expected[0]
        assert client.counters["given_up"] == 3
        assert all(count >= 2 for count in restarts(client).values()), restarts(client)


async def read_states(run_dir: Path, states: list[PipelineState]) -> None:
    """All that the launcher says."""
    sockets = Sockets(run_dir, {})
    control: AsyncReceiver[ControlMessage] = sockets.async_subscriber(CONTROL)
    try:
        while True:
            if isinstance(message := (await control.receive()).message, PipelineState):
                states.append(message)
    finally:
        sockets.close()


def of_epoch(states: list[PipelineState], worker: WorkerId, epoch: int) -> list[PipelineState]:
    return [
        state for state in states
        if any(one.worker == worker and one.epoch == epoch for one in state.workers)
    ]  # fmt: skip


def executed(state: PipelineState, worker: WorkerId) -> tuple[bytes, ...]:
    return next(one.executed for one in state.workers if one.worker == worker)


@pytest.mark.parametrize("faulty", [("llm:kill:bad:2",)], indirect=True)
async def test_a_quarantine_survives_preprocess_and_ends_with_the_first_token(faulty: Server) -> None:
    """A request kills the LLM; preprocess dies before that request comes again.

    The next LLM dies of it, too, but nobody else goes with it.
    """
    states: list[PipelineState] = []
    names = [f"good-{number}" for number in range(6)]

    async def until(is_so: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not is_so():
                await asyncio.sleep(0.02)

    async with PipelineClient(faulty.run_dir) as client, asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read_states(faulty.run_dir, states))
        expected = [await ask(client, f"before-{number}", number) for number in range(3)]
        pid = workers_of(faulty.process.pid)["preprocess.0"]
        good = [tasks.create_task(ask(client, name, number % 2)) for number, name in enumerate(names)]
        bad = tasks.create_task(ask(client, "bad", 2))
        await until(lambda: of_epoch(states, LLM_0, 2))
        os.kill(pid, signal.SIGKILL)
        assert await bad == expected[2], "the third LLM does not die of it"
        assert [await task for task in good] == [expected[number % 2] for number in range(len(names))]
        assert client.counters["given_up"] == 0
        assert restarts(client) == {"llm.0": 2, "preprocess.0": 1}
        digest = digest_of("bad")
        first, second = of_epoch(states, LLM_0, 2), of_epoch(states, LLM_0, 3)
        assert digest in executed(first[0], LLM_0)
        assert executed(second[0], LLM_0) == (digest,), "it took nobody along"
        assert of_epoch(first, PREPROCESS, 2), "between the two deaths"
        assert all(digest in state.quarantined[Role.LLM] for state in first + second[:1])
        await until(lambda: not states[-1].quarantined.get(Role.LLM))
        reading.cancel()


@pytest.mark.parametrize(
    "faulty",
    [
        (
            "llm:stop:hang-l:1",
            "vit:stop:hang-v:1",
            "vit:fail:fail-v:2",
            "preprocess:stop:hang-p:1",
            "llm:drop:LeaseReleased:3",
            "llm:drop:Accepted:1",
        )
    ],
    indirect=True,
)
async def test_who_hangs_or_fails_is_replaced_and_what_is_lost_heals(
    faulty: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.client.connection.QUERY_AFTER_S", 1.0)
    async with PipelineClient(faulty.run_dir) as client:
        # The first `Accepted` and the first releases get lost.
        pieces = [piece async for piece in client.generate([ChatMessage("user", "Hello")], GREEDY)]
        assert pieces[-1].num_output_tokens == 12
        expected = await ask(client, "plain", 1)
        for number in range(2, 5):
            await ask(client, f"more-{number}", number)
        async with asyncio.timeout(30):
            while await counter(client, "vit.0", "leases"):
                pass
        for name in ("hang-l", "hang-v", "fail-v", "hang-p"):
            picture = {"hang-v": 31, "fail-v": 32, "hang-p": 33}.get(name, 1)
            start = time.monotonic()
            tokens = await asyncio.wait_for(ask(client, name, picture), 30)
            assert tokens == (expected if picture == 1 else await ask(client, f"again-{name}", picture))
            assert time.monotonic() - start > (0 if name == "fail-v" else 2)
        assert restarts(client) == {"llm.0": 1, "vit.0": 2, "preprocess.0": 1}
    assert "has not moved on for" in faulty.output


@pytest.mark.parametrize("faulty", [("vit:fill:pool", "preprocess:fill:pool")], indirect=True)
async def test_with_full_pools_all_goes_on_one_by_one(faulty: Server) -> None:
    async with PipelineClient(faulty.run_dir) as client:
        answers = await asyncio.wait_for(
            asyncio.gather(*(ask(client, f"r{number}", number % 3) for number in range(9))), 60
        )
        assert answers[:3] == answers[3:6] == answers[6:]


async def test_a_stage_that_needs_nobody_any_more_is_not_disturbed(steady: Server) -> None:
    """And the endpoint's death ends only what came through it: at once, and it is back on its port."""
    long = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    async with PipelineClient(steady.run_dir) as client:
        expected = await ask(client, "expected", 1, long)
        ended: list[Exception] = []
        started = threading.Event()

        def stream() -> None:
            chat: Any = [{"role": "user", "content": "Hello"}]
            with steady.client() as http:
                events = http.chat.completions.create(
                    model="", messages=chat, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
                )
                try:
                    for _ in events:
                        started.set()
                except Exception as error:  # noqa: BLE001  which one is the library's affair
                    ended.append(error)

        thread = threading.Thread(target=stream)
        thread.start()
        begun = asyncio.Event()
        running = asyncio.create_task(ask(client, "running", 1, long, begun))
        assert await asyncio.to_thread(started.wait, 20)
        await asyncio.wait_for(begun.wait(), 20)
        assert not running.done()
        pids = workers_of(steady.process.pid)
        for name in ("api.0", "vit.0", "preprocess.0"):
            os.kill(pids[name], signal.SIGKILL)
        killed = time.monotonic()
        async with aiohttp.ClientSession() as probe:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with probe.get(f"{steady.url}/ready") as answer:
                        if answer.status == 200:
                            break
                assert time.monotonic() - killed < 5
                await asyncio.sleep(0.05)
            async with probe.get(f"{steady.url}/metrics") as answer:
                metrics = await answer.text()
        assert 'vlm_worker_restarts_total{worker="api.0"} 1' in metrics
        await asyncio.to_thread(thread.join, 10)
        assert len(ended) == 1
        while next(state.num_open_requests for state in client.workers if str(state.worker) == "llm.0") > 1:
            assert time.monotonic() - killed < 2 + 2  # ended within two seconds; told within two more
            await asyncio.sleep(0.05)
        assert await running == expected
        assert client.counters["resubmitted"] == 0


async def test_a_picture_that_takes_too_much_memory_fails_alone() -> None:
    huge = Image.new("RGB", (7000, 7000), "red")
    with Server("--media-memory-mib", "100", "--max-attempts", "2", *LIMITS) as server:
        async with PipelineClient(server.run_dir) as client:
            expected = await ask(client, "before", 1)
            good = [asyncio.create_task(ask(client, f"good-{number}", 1)) for number in range(3)]
            messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
            with pytest.raises(RequestError) as caught:
                _ = [piece async for piece in client.generate(messages, GREEDY, [encode(huge)])]
            assert caught.value.info.status == 400, caught.value
            assert "100 MiB of memory" in caught.value.info.message
            assert await asyncio.gather(*good) == [expected] * 3
            assert await ask(client, "after", 1) == expected
        server.children = workers_of(server.process.pid)


async def test_strangers_frames_are_refused_and_counted_and_nothing_dies(server: Server) -> None:
    """On every edge that a client can reach."""
    handle = TensorHandle("vit.0", 1, 0, 1, 0, (1 << 30, 1 << 30), "float32")
    key = ChunkKey("r", 1, 0, 0)
    forged = EmbeddingReady(sender=VIT_0, epoch=1, key=key, lease_id=1, embeddings=handle, was_encoded=True)
    good = msgspec.msgpack.encode(Hello(client_id=b"c" * 16, protocol=PROTOCOL_VERSION))
    no_text = {
        "type": "SubmitRequest",
        "client_id": b"c" * 16,
        "request_id": "\ud800".encode("utf-8", "surrogatepass"),
    }
    frames: list[list[bytes]] = [
        [b""],
        [os.urandom(200)],
        [good[:-1]],
        [good + b"x"],
        [b"\xc1"],
        [msgspec.msgpack.encode({"type": "Unknown"})],
        [
            msgspec.msgpack.encode(
                {"type": "Hello", "client_id": b"c", "protocol": PROTOCOL_VERSION, "more": 1}
            )
        ],
        [msgspec.msgpack.encode(forged)],
        [good] + [b""] * 3000,
        [msgspec.msgpack.encode(no_text)],
    ]
    async with PipelineClient(server.run_dir) as client:
        expected = await ask(client, "before", 1)
        epochs = restarts(client)
        before = await counter(client, "preprocess.0", "refused_messages")
        context = zmq.Context()
        epoch = next(state.epoch for state in client.workers if state.worker == PREPROCESS)
        for parts in frames:
            with context.socket(zmq.PUSH) as socket:
                socket.setsockopt(zmq.LINGER, 5000)
                socket.connect(f"ipc://{server.run_dir}/ingest.{epoch}")
                socket.send_multipart(parts)
        # larger than anything that may come: its connection is closed
        with context.socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(f"ipc://{server.run_dir}/ingest.{epoch}")
            socket.send(bytes(1 << 30), copy=False)
            await asyncio.sleep(0.5)
        with context.socket(zmq.SUB) as listener:
            for name in ("outputs.0.1", "control"):
                listener.connect(f"ipc://{server.run_dir}/{name}")
            for topic in (b"", b"x", b"c" * 15, b"c" * 5000):
                listener.setsockopt(zmq.SUBSCRIBE, topic)
            await asyncio.sleep(0.3)
            assert await ask(client, "meanwhile", 1) == expected
            heard = []
            while listener.poll(0):
                heard.append(listener.recv_multipart())
            assert all(topic == b"" and b"PipelineState" in data for topic, data in heard), (
                "only what is for everybody"
            )
        context.term()
        assert await counter(client, "preprocess.0", "refused_messages") == before + len(frames)
        assert await ask(client, "after", 1) == expected
        assert restarts(client) == epochs


def test_who_does_not_read_costs_others_nothing_and_is_cut_off() -> None:
    """The small size of `tools/slow_reader.py`; docs/recovery.md has a minute of it."""
    command = [
        sys.executable,
        "-m",
        "tools.slow_reader",
        "--seconds",
        "3",
        "--requests",
        "1",
        "--tokens",
        "2800",
        "--neighbours",
        "1",
    ]
    # noise of a short run
    done = subprocess.run([*command, "--slowdown", "3"], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["submitted again"] == 1
    assert found["cut off after (s)"] > 0
