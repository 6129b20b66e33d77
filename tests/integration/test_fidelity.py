"""Greedy tokens through the whole pipeline, real processes and sockets, are Hugging Face's: alone, together,
chunked, sharded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.client.client import PipelineClient
from pipeline.wire.sampling import SamplingParams
from tests.chats import CHATS as PICTURE_CHATS
from tests.chats import NUM_TOKENS, ChatTurns, generate, to_messages
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.pictures import noise
from tests.reference import Answer, Reference, assert_same_tokens
from tests.servers import Server
from tests.videos import VIDEO_CHATS

CHATS = {**PICTURE_CHATS, **VIDEO_CHATS}
SETUPS = {
    "default": (),
    "small chunks and blocks": (
        "--max-num-batched-tokens",
        "9",
        "--max-num-seqs",
        "8",
        "--block-size",
        "4",
        "--vit-max-batch-patches",
        "16",
        "--max-itl-stretch",
        "0",
    ),
    "little KV without a prefix cache": (
        "--kv-cache-gib",
        "0.0011",
        "--max-model-len",
        "512",
        "--no-prefix-caching",
    ),
    "ViT on onnxruntime": ("--vit-engine", "onnxruntime", "--vit", "2"),
    "tp 2, overlap": ("--tp", "2", "--overlap", "on"),
    "dp 2, tp 2": ("--dp", "2", "--tp", "2", "--vit", "1"),
}


LOSSY = {
    "int8": ("--dtype", "float32", "--quantization", "int8"),
    "int4, tp 2": ("--dtype", "bfloat16", "--quantization", "int4", "--tp", "2"),
}


@pytest.fixture(scope="module")
def references(random_checkpoint: Path) -> dict[str, Answer]:
    reference = Reference(random_checkpoint)
    return {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}


@pytest.mark.parametrize("setup", SETUPS)
def test_greedy_tokens_of_a_random_model(
    setup: str, random_checkpoint: Path, references: dict[str, Answer], tmp_path: Path
) -> None:
    async def run(server: Server) -> None:
        async with PipelineClient(server.run_dir) as client:
            for name, chat in CHATS.items():  # one after the other
                tokens, num_prompt_tokens = await generate(client, *to_messages(chat))
                assert num_prompt_tokens == len(references[name].prompt_token_ids)
                assert_same_tokens(tokens, references[name], f"{setup}, {name}")
            together = await asyncio.gather(  # with every picture cached
                *(generate(client, *to_messages(chat)) for chat in CHATS.values())
            )
            for (name, answer), (tokens, _) in zip(references.items(), together, strict=True):
                assert_same_tokens(tokens, answer, f"{setup}, {name}, together")

    with Server(
        "--model",
        str(random_checkpoint),
        "--dtype",
        "float32",
        "--cache-dir",
        str(tmp_path),
        *LIMITS,
        *SETUPS[setup],
    ) as server:
        asyncio.run(run(server))


def test_weights_of_16_bits_computed_in_float32(tmp_path: Path) -> None:
    """As published checkpoints come: another kind of linear layer than for weights of 32 bits. The
    embedded model, on one rank, has such weights, too."""
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16)
    reference = Reference(folder)
    references = {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}

    async def run(server: Server) -> None:
        async with PipelineClient(server.run_dir) as client:
            for _ in range(2):  # the second time with every prefix and picture cached
                together = await asyncio.gather(
                    *(generate(client, *to_messages(chat)) for chat in CHATS.values())
                )
                for (name, answer), (tokens, _) in zip(references.items(), together, strict=True):
                    assert_same_tokens(tokens, answer, name)

    with Server("--model", str(folder), "--dtype", "float32", *LIMITS, "--tp", "2") as server:
        asyncio.run(run(server))


def test_greedy_tokens_of_the_embedded_model(server: Server) -> None:
    """The user's own command: the embedded model, `--tp 4`, on a CPU; and on one rank."""
    reference = Reference(EMBEDDED / "model")
    references = {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}

    async def run(asked: Server, tp: int) -> None:
        roles = [name.split(".")[0] for name in asked.children]
        assert (roles.count("llm"), roles.count("vit")) == (tp, tp)
        async with PipelineClient(asked.run_dir) as client:
            together = await asyncio.gather(
                *(generate(client, *to_messages(chat)) for chat in CHATS.values())
            )
            for (name, answer), (tokens, _) in zip(references.items(), together, strict=True):
                assert_same_tokens(tokens, answer, f"tp {tp}, {name}")

    asyncio.run(run(server, 1))
    with Server("--tp", "4", "--dtype", "float32", *LIMITS) as sharded:
        asyncio.run(run(sharded, 4))


def many_pictures(request: int, count: int) -> ChatTurns:
    parts: list[object] = []
    for number in range(count):
        parts += [f"{number}", noise(1000 * request + number, (28, 28))]
    return [("user", [*parts, "What is the last one?"])]  # type: ignore[list-item]


def test_many_half_arrived_requests_share_tiny_pools(tmp_path: Path) -> None:
    """8 requests of 64 small pictures each, pools of a few chunks: all finish, with the tokens that they get
    alone.

    That exactly three fit, and that pixels come in reverse, is in `test_vit_process.py`.
    """
    folder = make_checkpoint(tmp_path, processor={"min_pixels": 28 * 28, "max_pixels": 28 * 28})
    options = [
        "--embedding-pool-mib",
        "0",
        "--pixel-pool-mib",
        "0",
        "--max-model-len",
        "512",
        "--vit",
        "2",
        "--dtype",
        "float32",
    ]

    async def run(server: Server) -> None:
        async with PipelineClient(server.run_dir) as client:
            chats = [to_messages(many_pictures(request, 64)) for request in range(8)]
            together = await asyncio.gather(*(generate(client, *chat) for chat in chats))
            for chat, (tokens, _) in list(zip(chats, together, strict=True))[:2]:
                alone, _ = await generate(client, *chat)
                assert alone == tokens

    with Server("--model", str(folder), *options) as server:
        asyncio.run(asyncio.wait_for(run(server), 100))


def test_interrupted_requests_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """A KV cache that cannot hold all outputs, no prefix cache, and ViT pools that keep three pictures: the
    preempted start again."""
    folder = make_checkpoint(tmp_path, processor={"min_pixels": 28 * 28, "max_pixels": 28 * 28})
    options = [
        "--embedding-pool-mib", "0", "--pixel-pool-mib", "0", "--max-model-len", "512", "--kv-cache-gib",
        "0.00098", "--no-prefix-caching",
        "--block-size", "4", "--dtype", "float32",
    ]  # fmt: skip

    async def run(server: Server) -> None:
        async with PipelineClient(server.run_dir) as client:
            chats = [to_messages(many_pictures(request, 40)) for request in range(3)]
            sampling = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)
            alone = [await generate(client, *chat, sampling) for chat in chats]
            assert client.counters["resubmitted"] == 0
            # on a slow machine the requests may come too far apart to take blocks from each other
            for _ in range(10):
                together = await asyncio.gather(*(generate(client, *chat, sampling) for chat in chats))
                assert together == alone
                if client.counters["resubmitted"] > 0:
                    return
            pytest.fail("no request was interrupted: this shows nothing")

    with Server("--model", str(folder), *options) as server:
        asyncio.run(asyncio.wait_for(run(server), 100))


@pytest.mark.parametrize("name", LOSSY)
def test_agreement_of_lossy_arithmetic_is_reported(
    name: str,
    random_checkpoint: Path,
    references: dict[str, Answer],
    record_property: Callable[[str, object], None],
) -> None:
    """The rate of agreement is reported, not demanded; that it serves at all is."""

    async def run(server: Server) -> float:
        same = 0
        async with PipelineClient(server.run_dir) as client:
            for name, chat in CHATS.items():
                tokens, _ = await generate(client, *to_messages(chat))
                assert len(tokens) == NUM_TOKENS
                same += sum(
                    mine == theirs for mine, theirs in zip(tokens, references[name].token_ids, strict=True)
                )
        return same / (NUM_TOKENS * len(CHATS))

    with Server("--model", str(random_checkpoint), *LOSSY[name], *LIMITS) as server:
        rate = asyncio.run(run(server))
    record_property(f"tokens in {name} equal to Hugging Face's in float32", rate)
    assert 0 < rate <= 1
