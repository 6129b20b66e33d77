"""A family of another package through the whole pipeline: its tokens are those of its plain reference."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, assert_never

import pytest
from PIL import Image

from pipeline.client.client import PipelineClient
from pipeline.wire.prompts import ChatMessage, ImagePart, Part, TextPart, VideoPart
from pipeline.wire.sampling import SamplingParams
from tests.chats import Clip
from tests.integration.conftest import LIMITS
from tests.pictures import encode, noise, scene
from tests.servers import Server
from tests.toy_family.checkpoint import install_toy, make_toy
from tests.toy_family.reference import Answer, ChatTurns, Film, Piece, Reference
from tests.videos import counting_frames, encode_video
from tools.processes import workers_of

NUM_TOKENS = 16
TIE = 2e-4  # two logits closer than this may swap: rounding moves these by 1e-5
LONG = 150  # tokens of an answer during which somebody is killed
FRAMES = tuple(scene(number, (90, 60)) for number in range(20, 25))
CHATS: dict[str, ChatTurns] = {
    "text only": [("user", ["What is the capital of France?"])],
    "one picture": [("user", [scene(1), "What is in this picture?"])],
    "a picture of one row": [("user", [noise(2, (150, 30)), "What?"])],
    "pictures in two turns": [
        ("user", ["First", scene(3, (60, 90)), "then", noise(4, (130, 75)), "what changed?"]),
        ("assistant", ["A red circle."]),
        ("user", ["And this one?", scene(5, (90, 90))]),
    ],
    "frames, an odd number": [("user", [Film(FRAMES, None), "Which was first?"])],
    "frames, one a second": [("user", [Film(FRAMES, 1.0), "Which was first?"])],
    "a video": [
        ("user", ["Look:", Clip(encode_video(counting_frames(16, (90, 60)), 8.0), 4.0), "What happens?"])
    ],
}
SMALL_CHUNKS = ("--max-num-batched-tokens", "16", "--max-num-seqs", "4", "--block-size", "4")


class Toy(NamedTuple):
    folder: Path
    reference: Reference
    answers: dict[str, Answer]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_toy(tmp_path_factory.mktemp("site") / "packages")


def toy(folder: Path, has_memory: bool, seed: int) -> Toy:
    reference = Reference(make_toy(folder, has_memory, seed))
    answers = {name: clear_answer(reference, chat) for name, chat in CHATS.items()}
    return Toy(folder, reference, answers)


def clear_answer(reference: Reference, chat: ChatTurns, num_tokens: int = NUM_TOKENS) -> Answer:
    answer = reference.answer(chat, num_tokens)
    assert answer.least_gap > TIE, "it hangs on rounding: another seed is needed"
    return answer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("plain") / "model", has_memory=False, seed=0)


@pytest.fixture(scope="module")
def with_memory(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("memory") / "model", has_memory=True, seed=1)


class Told(NamedTuple):
    """What came of a chat."""

    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int


def to_messages(chat: ChatTurns) -> tuple[list[ChatMessage], list[bytes]]:
    media: list[bytes] = []

    def add(data: bytes) -> int:
        media.append(data)
        return len(media) - 1

    def to_part(piece: Piece) -> Part:
        match piece:
            case str():
                return TextPart(piece)
            case Film(frames, fps):
                return VideoPart(frames=tuple(ImagePart(frame=add(encode(one))) for one in frames), fps=fps)
            case Clip(data, fps):
                return VideoPart(frame=add(data), fps=fps)
            case Image.Image():
                return ImagePart(frame=add(encode(piece)))
            case _:
                assert_never(piece)

    return [ChatMessage(role, tuple(to_part(piece) for piece in pieces)) for role, pieces in chat], media


async def ask(
    client: PipelineClient,
    chat: ChatTurns,
    num_tokens: int = NUM_TOKENS,
    started: asyncio.Event | None = None,
) -> Told:
    messages, media = to_messages(chat)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    pieces = []
    async for piece in client.generate(messages, sampling, media):
        pieces.append(piece)
        if started is not None:
            started.set()
    tokens = [token for piece in pieces for token in piece.token_ids]
    return Told(tokens, pieces[-1].num_prompt_tokens, pieces[-1].num_cached_tokens)


def assert_right(told: Sequence[Told], toy: Toy) -> None:
    for (name, answer), one in zip(toy.answers.items(), told, strict=True):
        assert one.num_prompt_tokens == answer.num_prompt_tokens, name
        assert one.token_ids == answer.token_ids, name


async def ask_all(client: PipelineClient) -> list[Told]:
    """Together."""
    return list(await asyncio.gather(*(ask(client, chat) for chat in CHATS.values())))


async def num_encodes(client: PipelineClient) -> int:
    await asyncio.sleep(2.2)  # counts are told once a second, and passed on once a second
    return sum(state.counters.get("encodes", 0) for state in client.workers if state.worker.role == "vit")


def test_the_reference_sees_what_it_is_asked_about(plain: Toy, with_memory: Toy) -> None:
    """Else equal tokens would prove nothing."""
    for toy in (plain, with_memory):
        texts = [tuple(answer.token_ids) for answer in toy.answers.values()]
        assert len(set(texts)) == len(texts), "pictures, and the time between frames, change the answer"
        assert all(len(set(text)) > 4 for text in texts), "no answer repeats itself"
    assert all(plain.answers[name].token_ids != with_memory.answers[name].token_ids for name in CHATS)


async def test_any_chunks_and_prefixes_of_the_cache(plain: Toy, package: Path) -> None:
    with Server(
        "--model", str(plain.folder), "--dtype", "float32", *LIMITS, *SMALL_CHUNKS, python_path=package
    ) as server:
        async with PipelineClient(server.run_dir) as client:
            assert_right([await ask(client, chat) for chat in CHATS.values()], plain)
            again = await ask_all(client)
            assert_right(again, plain)
            for told in again:
                assert told.num_prompt_tokens - 4 <= told.num_cached_tokens < told.num_prompt_tokens
            await _another_rate_is_another_prefix(client, plain)


async def _another_rate_is_another_prefix(client: PipelineClient, plain: Toy) -> None:
    """The same pixels with another time between them: the ViT knows them, the prefix cache must not."""
    before = await num_encodes(client)
    half: ChatTurns = [("user", [Film(FRAMES, 2.0), "Which was first?"])]
    expected = clear_answer(plain.reference, half)
    told = await ask(client, half)
    assert told.token_ids == expected.token_ids
    assert told.num_cached_tokens <= 8, "the text before the frames, and nothing of them"
    assert await num_encodes(client) == before
    again = await ask(client, half)
    assert again.token_ids == expected.token_ids
    assert again.num_cached_tokens >= again.num_prompt_tokens - 4


async def test_a_layer_with_a_state_and_killed_workers(with_memory: Toy, package: Path) -> None:
    long: ChatTurns = [("user", [scene(30, (90, 60)), "Tell me more."])]
    expected = clear_answer(with_memory.reference, long, LONG)
    with Server(
        "--model", str(with_memory.folder), "--dtype", "float32", *LIMITS, python_path=package
    ) as server:
        async with PipelineClient(server.run_dir) as client:
            for _ in range(2):
                together = await ask_all(client)
                assert_right(together, with_memory)
                has_cached = any(told.num_cached_tokens for told in together)
            assert has_cached, "the second time states of prefixes are kept"
            for number, victim in enumerate(("vit.0", "llm.0")):
                started = asyncio.Event()
                running = asyncio.create_task(ask(client, long, LONG, started))
                await asyncio.wait_for(started.wait(), 20)
                # The ViT is asked for something new, and dies.
                assert not running.done()
                new: ChatTurns = [("user", [scene(40 + number, (180, 180)), "And this?"])]
                late = asyncio.create_task(ask(client, new))
                os.kill(workers_of(server.process.pid)[victim], signal.SIGKILL)
                assert (await asyncio.wait_for(running, 40)).token_ids == expected.token_ids
                assert (await late).token_ids == clear_answer(with_memory.reference, new).token_ids
            assert_right(await ask_all(client), with_memory)
            epochs = {str(state.worker): state.epoch for state in client.workers}
            assert (epochs["vit.0"], epochs["llm.0"]) == (2, 2)
            assert client.counters["resubmitted"] > 0
        server.children = workers_of(server.process.pid)


@pytest.mark.parametrize("name", ["plain", "with_memory"])
async def test_tensor_parallel(name: str, package: Path, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(name)
    options = ("--tp", "2", "--overlap", "on", *SMALL_CHUNKS)
    with Server(
        "--model", str(toy.folder), "--dtype", "float32", *LIMITS, *options, python_path=package
    ) as server:
        async with PipelineClient(server.run_dir) as client:
            for _ in range(2):
                assert_right(await ask_all(client), toy)
