"""Adapters through the whole pipeline: on two ranks, over HTTP by the model's name, with pictures, and while
workers are killed. Each answer is that of Hugging Face's model with the adapter merged."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import openai
import pytest

from pipeline.client.client import PipelineClient
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import SamplingParams
from tests.adapters import SPREAD, is_of_text, merged
from tests.chats import ChatTurns, to_messages
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.pictures import data_url, scene
from tests.reference import Answer, Reference, assert_same_tokens
from tests.servers import Server
from tools.processes import workers_of
from tools.random_checkpoint.lora import write_adapter

PICTURE = scene(1, (112, 84))
QUESTION = "What is in this picture? Tell all that you see."
CHAT: ChatTurns = [("user", [PICTURE, QUESTION])]
NUM_TOKENS, FEW = 60, 12
NAMES = ("", "words", "eyes", "both")  # "": the model
LONG = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


class Adapted(NamedTuple):
    server: Server
    folder: Path
    answers: dict[str, Answer]
    reference: Reference


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adapted]:
    """One adapter of the decoder, one of the tower, one of both."""
    place = tmp_path_factory.mktemp("adapted")
    folder = make_checkpoint(place / "base", "qwen3_vl")
    adapters = {
        "words": write_adapter(folder, place / "words", 4, SPREAD, is_of_text),
        "eyes": write_adapter(folder, place / "eyes", 3, SPREAD, lambda name: not is_of_text(name)),
        "both": write_adapter(folder, place / "both", 2, SPREAD, use_rslora=True),
    }
    folders = {name: merged(folder, adapters[name], place / f"merged-{name}") for name in NAMES[1:]}
    answers = {name: Reference(one).answer(CHAT, NUM_TOKENS) for name, one in folders.items()}
    reference = Reference(folder)
    answers[""] = reference.answer(CHAT, NUM_TOKENS)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == len(NAMES)
    options = [option for name, place in adapters.items() for option in ("--lora", f"{name}={place}")]
    served = "--model", str(folder), "--served-model-name", "base", "--tp", "2", "--dtype", "float32"
    with Server(*served, *options, *LIMITS) as server:
        yield Adapted(server, folder, answers, reference)
        server.children = workers_of(server.process.pid)


async def ask(client: PipelineClient, name: str, sampling: SamplingParams) -> list[int]:
    messages, frames = to_messages(CHAT)
    tokens: list[int] = []
    async for piece in client.generate(messages, sampling, frames, adapter=name):
        tokens += piece.token_ids
    return tokens


async def assert_right(client: PipelineClient, adapted: Adapted, num_tokens: int, what: str) -> None:
    """All at once, twice each."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    asked = NAMES * 2
    found = await asyncio.gather(*(ask(client, name, sampling) for name in asked))
    for name, tokens in zip(asked, found, strict=True):
        answer = adapted.answers[name]
        expected = answer._replace(token_ids=answer.token_ids[:num_tokens])
        assert_same_tokens(tokens, expected, f"{what}, adapter {name!r}")


async def test_three_adapters_and_the_model_at_once(adapted: Adapted) -> None:
    async with PipelineClient(adapted.server.run_dir) as client:
        assert client.welcome.adapters == NAMES[1:]
        await assert_right(client, adapted, NUM_TOKENS, "at once")
        await assert_right(client, adapted, FEW, "from the caches")
        with pytest.raises(RequestError, match="the adapter 'nobody' is not served here") as refused:
            await ask(client, "nobody", LONG)
        assert (refused.value.info.status, refused.value.info.field) == (404, "adapter")


def test_models_of_the_endpoint(adapted: Adapted) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(PICTURE)}},
        {"type": "text", "text": QUESTION},
    ]
    with adapted.server.client() as client:
        cards = {card.id: card.model_dump()["parent"] for card in client.models.list()}
        assert cards == {"base": None, **dict.fromkeys(NAMES[1:], "base")}
        for name in NAMES:
            answer = client.chat.completions.create(
                model=name or "base",
                messages=[{"role": "user", "content": parts}],  # type: ignore[list-item]
                temperature=0,
                max_tokens=FEW,
                extra_body={"ignore_eos": True, "repetition_penalty": 1.0, "skip_special_tokens": False},
            )
            assert answer.model == (name or "base")
            expected = adapted.answers[name].token_ids[:FEW]
            text = adapted.reference.tokenizer.decode(expected)
            assert answer.choices[0].message.content == text, name
        with pytest.raises(openai.NotFoundError, match="'nobody' is not served here, only 'base', 'words'"):
            client.completions.create(model="nobody", prompt="Hi")


@pytest.mark.parametrize("victim", ["vit.0", "llm.1", "preprocess.0"])
async def test_a_request_goes_on_with_its_adapter_when_a_worker_dies(victim: str, adapted: Adapted) -> None:
    """What is resubmitted names the adapter; the successor has loaded it."""
    async with PipelineClient(adapted.server.run_dir) as client:
        begun = asyncio.Event()
        running = asyncio.create_task(go_on(client, begun))
        await asyncio.wait_for(begun.wait(), 60)
        os.kill(workers_of(adapted.server.process.pid)[victim], signal.SIGKILL)
        await assert_right(client, adapted, FEW, f"{victim} was killed")
        tokens = await asyncio.wait_for(running, 60)
        assert_same_tokens(tokens, adapted.answers["both"], f"{victim} was killed, a long answer")


async def go_on(client: PipelineClient, begun: asyncio.Event) -> list[int]:
    messages, frames = to_messages(CHAT)
    tokens: list[int] = []
    async for piece in client.generate(messages, LONG, frames, adapter="both"):
        tokens += piece.token_ids
        begun.set()
    return tokens
