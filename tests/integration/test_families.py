"""Every family through the whole pipeline, real processes and sockets: greedy tokens are Hugging Face's."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.client.client import PipelineClient
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns, FrameList, generate, to_messages
from tests.checkpoints import make_checkpoint
from tests.family_chats import FAMILY_CHATS
from tests.integration.conftest import LIMITS
from tests.pictures import data_url, scene
from tests.reference import ROUTER_TIE, Answer, Reference, assert_same_tokens
from tests.servers import Server
from tools.processes import workers_of

NUM_TOKENS, FEW = 24, 12
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=FEW, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
LONG_CHATS: list[ChatTurns] = [
    [("user", [scene(number, (112, 84)), "Tell more."])] for number in range(60, 64)
]
MODEL = ("--dtype", "float32", *LIMITS)
# What differs from one server to the next, put together so that few servers do. Each family has one of them:
# the first is for each kind of tower, the second for paged decoders and for those with states.
SHARDED = (
    "--max-num-batched-tokens", "23", "--max-num-seqs", "16", "--block-size", "4", "--max-itl-stretch", "0",
    "--overlap", "on", "--vit", "2", "--vit-engine", "onnxruntime",
)  # fmt: skip
NUM_RANKS = {"qwen2_5_vl": "2", "qwen3_vl": "4", "qwen3_5_moe": "2"}
REPLICATED = ("--dp", "2", "--max-model-len", "640")
# With states of sequences beside the blocks of one such context.
KV_GIB = {"qwen3_vl_moe": "0.001", "qwen3_5": "0.004"}


class Family(NamedTuple):
    name: str
    folder: Path
    reference: Reference
    chats: dict[str, ChatTurns]
    answers: dict[str, Answer]


@pytest.fixture(scope="module")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    @functools.cache
    def make(name: str) -> Family:
        folder = make_checkpoint(tmp_path_factory.mktemp(name), name)
        reference = Reference(folder)
        answers = {chat: reference.answer(turns, NUM_TOKENS) for chat, turns in FAMILY_CHATS.items()}
        num_ties = sum(answer.router_gap < ROUTER_TIE for answer in answers.values())
        assert num_ties <= 3, "too few are compared"
        return Family(name, folder, reference, FAMILY_CHATS, answers)

    return make


@pytest.fixture
def family(request: pytest.FixtureRequest, make_family: Callable[[str], Family]) -> Family:
    return make_family(request.param)


async def assert_right(
    client: PipelineClient, family: Family, what: str, num_tokens: int = NUM_TOKENS
) -> None:  # fmt: skip
    """All chats together."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    chats = [to_messages(chat) for chat in family.chats.values()]
    together = await asyncio.gather(*(generate(client, *chat, sampling) for chat in chats))
    for (name, answer), (tokens, num_prompt_tokens) in zip(family.answers.items(), together, strict=True):
        assert num_prompt_tokens == len(answer.prompt_token_ids), name
        assert_same_tokens(
            tokens, answer._replace(token_ids=answer.token_ids[:num_tokens]), f"{what}, {name}"
        )


def ask_over_http(server: Server, family: Family, name: str) -> None:
    """The same chat as an OpenAI client writes it."""
    ((_, pieces),) = family.chats[name]
    parts: list[dict[str, object]] = []
    for piece in pieces:
        if isinstance(piece, FrameList):
            urls = [data_url(frame) for frame in piece.frames]
            parts.append({"type": "video", "video": urls, "timestamps": list(piece.timestamps or ())})
        else:
            assert isinstance(piece, str)
            parts.append({"type": "text", "text": piece})
    with server.client() as client:
        answer = client.chat.completions.create(
            model=str(family.folder),
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
            temperature=0,
            max_tokens=FEW,
            logprobs=True,
            extra_body={"ignore_eos": True, "repetition_penalty": 1.0},
        )
    expected = family.answers[name]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    content = (answer.choices[0].logprobs or pytest.fail("no logprobs")).content or []
    tokens = [family.reference.tokenizer.decode([token]) for token in expected.token_ids[:FEW]]
    assert [entry.token for entry in content] == tokens


async def saw_preemptions(client: PipelineClient) -> bool:
    """Counts are told once a second, and passed on once a second."""
    for _ in range(20):
        if any(state.counters.get("num_preemptions", 0) for state in client.workers):
            return True
        await asyncio.sleep(0.5)
    return False


@pytest.mark.parametrize("family", [*NUM_RANKS, *KV_GIB], indirect=True)
def test_the_reference_sees_what_it_is_asked_about(family: Family) -> None:
    """Else equal tokens would prove nothing."""
    texts = {tuple(answer.token_ids) for answer in family.answers.values()}
    assert len(texts) == len(family.answers)


@pytest.mark.parametrize("family", NUM_RANKS, indirect=True)
async def test_small_chunks_several_ranks_and_two_vits_on_onnxruntime(family: Family, tmp_path: Path) -> None:
    options = (*MODEL, *SHARDED, "--tp", NUM_RANKS[family.name], "--cache-dir", str(tmp_path))
    with Server("--model", str(family.folder), *options) as server:
        async with PipelineClient(server.run_dir) as client:
            await assert_right(client, family, "sharded")
            await assert_right(client, family, "sharded, from the caches", FEW)
        ask_over_http(server, family, "frames with times")


@pytest.mark.parametrize("family", KV_GIB, indirect=True)
async def test_two_groups_with_little_memory_and_killed_workers(family: Family) -> None:
    """Requests are preempted; then whoever works for one is killed, and the request goes on."""
    expected = [family.reference.answer(chat, LONG.max_tokens) for chat in LONG_CHATS]
    options = (*MODEL, *REPLICATED, "--kv-cache-gib", KV_GIB[family.name])
    with Server("--model", str(family.folder), *options) as server:
        async with PipelineClient(server.run_dir) as client:
            await assert_right(client, family, "replicated")
            long = [to_messages(chat) for chat in LONG_CHATS]
            together = await asyncio.gather(*(generate(client, *chat, LONG) for chat in long * 4))
            for (tokens, _), answer in zip(together, expected * 4, strict=True):
                assert_same_tokens(tokens, answer, "preempted")
            assert await saw_preemptions(client)
            for victim in ("vit.0", "llm.1"):
                begun = asyncio.Event()
                running = asyncio.create_task(generate(client, *to_messages(LONG_CHATS[0]), LONG, begun))
                await asyncio.wait_for(begun.wait(), 60)
                os.kill(workers_of(server.process.pid)[victim], signal.SIGKILL)
                await assert_right(client, family, f"{victim} was killed", FEW)
                tokens, _ = await asyncio.wait_for(running, 60)
                assert_same_tokens(tokens, expected[0], f"{victim} was killed, a long answer")
            epochs = {str(state.worker): state.epoch for state in client.workers}
            assert [epochs[name] for name in ("vit.0", "llm.1")] == [2, 2]
            assert client.counters["resubmitted"] > 0
        server.children = workers_of(server.process.pid)


@pytest.mark.parametrize(("quantization", "least"), [("int8", 8), ("int4", 1)])
async def test_layers_with_a_state_in_fewer_bits(
    quantization: str, least: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """On two ranks, each with its own part, and behind a tower in as few bits. Large random weights amplify
    errors; by chance, one answer in 4096 would begin as it should."""
    folder = make_checkpoint(tmp_path / "model", "qwen3_5")
    reference = Reference(folder)
    num_right = 0
    with Server("--model", str(folder), *MODEL, "--tp", "2", "--quantization", quantization) as server:
        async with PipelineClient(server.run_dir) as client:
            for chat in FAMILY_CHATS.values():
                tokens, _ = await generate(client, *to_messages(chat), SHORT)
                assert len(tokens) == FEW
                num_right += tokens[0] == reference.answer(chat, 1).token_ids[0]
    name = f"first tokens in {quantization}, tp 2, equal to Hugging Face's, of {len(FAMILY_CHATS)}"
    record_property(name, num_right)
    assert num_right >= least


@pytest.mark.parametrize("option", ["--expert-parallel", "--quantization"])
async def test_experts_in_other_places_and_formats(option: str, tmp_path: Path) -> None:
    """Whole experts on ranks give the same tokens; in 8 bits they are served."""
    folder = make_checkpoint(tmp_path / "model", "qwen3_vl_moe")
    chats = {name: FAMILY_CHATS[name] for name in ("one picture", "pictures and videos mixed")}
    reference = Reference(folder)
    is_exact = option == "--expert-parallel"
    options = (option, "--tp", "4") if is_exact else (option, "int8")
    with Server("--model", str(folder), *MODEL, *options) as server:
        async with PipelineClient(server.run_dir) as client:
            for name, chat in chats.items():
                tokens, _ = await generate(client, *to_messages(chat), GREEDY)
                assert len(tokens) == NUM_TOKENS
                if is_exact:
                    assert_same_tokens(tokens, reference.answer(chat, NUM_TOKENS), name)
