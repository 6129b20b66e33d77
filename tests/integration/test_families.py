"""Every family through the whole pipeline, real processes and sockets: greedy tokens are Hugging Face's."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.client.client import PipelineClient
from pipeline.families import read_model_info
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns, FrameList, generate, to_messages
from tests.checkpoints import make_checkpoint
from tests.family_chats import FAMILY_CHATS
from tests.integration.conftest import LIMITS
from tests.pictures import scene
from tests.reference import Answer, Reference, assert_same_tokens
from tests.servers import Server
from tools.processes import workers_of

NUM_TOKENS = 48
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SETUPS = {
    "small chunks, ViTs on onnxruntime": (
        *(
            "--max-num-batched-tokens",
            "23",
            "--max-num-seqs",
            "16",
            "--block-size",
            "4",
            "--max-itl-stretch",
            "0",
        ),
        *("--vit", "2", "--vit-engine", "onnxruntime"),
    ),
    "tp 2, overlap": ("--tp", "2", "--overlap", "on"),
    "dp 2, little KV": ("--dp", "2", "--kv-cache-gib", "0.003", "--max-model-len", "640"),
}


class Family(NamedTuple):
    name: str
    folder: Path
    reference: Reference
    chats: dict[str, ChatTurns]
    answers: dict[str, Answer]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    reference = Reference(folder)
    answers = {name: reference.answer(chat, NUM_TOKENS) for name, chat in FAMILY_CHATS.items()}
    return Family(request.param, folder, reference, FAMILY_CHATS, answers)


async def assert_right(client: PipelineClient, family: Family, what: str) -> None:
    """All chats together."""
    chats = [to_messages(chat) for chat in family.chats.values()]
    together = await asyncio.gather(*(generate(client, *chat, GREEDY) for chat in chats))
    for (name, answer), (tokens, num_prompt_tokens) in zip(family.answers.items(), together, strict=True):
        assert num_prompt_tokens == len(answer.prompt_token_ids), name
        assert_same_tokens(tokens, answer, f"{what}, {name}")


def test_the_reference_sees_what_it_is_asked_about(family: Family) -> None:
    """Else equal tokens would prove nothing."""
    texts = {tuple(answer.token_ids) for answer in family.answers.values()}
    assert len(texts) == len(family.answers)


@pytest.mark.parametrize("setup", SETUPS)
async def test_greedy_tokens(setup: str, family: Family, tmp_path: Path) -> None:
    options = (*LIMITS, "--cache-dir", str(tmp_path), *SETUPS[setup])
    with Server("--model", str(family.folder), "--dtype", "float32", *options) as server:
        async with PipelineClient(server.run_dir) as client:
            await assert_right(client, family, setup)
            await assert_right(client, family, f"{setup}, from the caches")
