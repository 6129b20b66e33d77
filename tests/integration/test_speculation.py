"""Guesses in a real pipeline: every answer is the one of a server without them, also when ranks die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from pipeline.client.client import Piece, PipelineClient
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tests.checkpoints import make_checkpoint
from tests.integration.conftest import LIMITS
from tests.pictures import encode, scene
from tests.servers import Server
from tools.processes import workers_of
from tools.random_checkpoint.agreeing import make_agree

# Without an end the embedded model's answers repeat themselves, and each other.
LONG = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
WANTED = {
    "greedy": LONG,
    "drawn": SamplingParams(temperature=0.8, seed=4, n=2, max_tokens=60, ignore_eos=True, logprobs=1),
    "stopped": SamplingParams(temperature=0, max_tokens=90, ignore_eos=True, stop=("......",)),
    "punished": SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, frequency_penalty=0.2),
    "ruled": SamplingParams(
        temperature=0.5, seed=9, max_tokens=60, grammar=Grammar(GrammarKind.REGEX, "([a-z]+ ){9}[.]")
    ),
}


class Told(NamedTuple):
    """What a client is told of one choice."""

    tokens: list[int]
    text: str
    num_output_tokens: int
    ends: list[tuple[str | None, str | int | None]]
    num_logprobs: int


async def ask(
    client: PipelineClient, name: str, sampling: SamplingParams, kill: Callable[[], None] | None = None
) -> list[Told]:
    """`kill` is called in the middle of the first choice."""
    text = TextPart("What is in it? Say it again and again: what is in it?")
    messages = [ChatMessage("user", (ImagePart(frame=0), text))]
    pieces: list[list[Piece]] = [[] for _ in range(sampling.n)]
    async for piece in client.generate(messages, sampling, [encode(scene(3))], name):
        pieces[piece.index].append(piece)
        if kill is not None and piece.index == 0 and piece.num_output_tokens >= 20:
            kill()
            kill = None
    return [
        Told(
            [token for piece in of_choice for token in piece.token_ids],
            "".join(piece.text for piece in of_choice),
            of_choice[-1].num_output_tokens,
            [(str(one.finish_reason), one.stop_reason) for one in of_choice if one.finish_reason],
            sum(len(piece.logprobs) for piece in of_choice),
        )
        for of_choice in pieces
    ]


async def all_answers(client: PipelineClient) -> dict[str, list[Told]]:
    told = await asyncio.gather(*(ask(client, name, sampling) for name, sampling in WANTED.items()))
    return dict(zip(WANTED, told, strict=True))


async def wait_for_accepted(server: Server, least: int = 100) -> None:
    """By `/metrics`; workers tell their counts once a second."""
    name = "vlm_spec_decode_num_accepted_tokens_total{"
    async with aiohttp.ClientSession() as session, asyncio.timeout(30):
        while True:
            async with session.get(f"{server.url}/metrics") as response:
                lines = (await response.text()).splitlines()
            if sum(float(line.split()[-1]) for line in lines if line.startswith(name)) > least:
                return
            await asyncio.sleep(0.1)


async def assert_deaths_change_nothing(
    guessing: Server, client: PipelineClient, expected: dict[str, list[Told]], victims: Sequence[str]
) -> None:
    """With any rank its whole group dies."""
    for victim in victims:

        def kill(victim: str = victim) -> None:
            os.kill(workers_of(guessing.process.pid)[victim], signal.SIGKILL)

        assert await ask(client, victim, WANTED["drawn"], kill) == expected["drawn"]
    assert client.counters["resubmitted"] == len(victims)


@pytest.mark.parametrize(("quantization", "tp"), [("int8", "2"), ("int4", "1")])
async def test_every_answer_is_the_same_in_fewer_bits(quantization: str, tp: str) -> None:
    """Steps of several tokens take other kernels than those of one, or other sizes of the same."""
    options = ("--quantization", quantization, "--tp", tp, "--vit", "1", "--dtype", "float32", *LIMITS)
    answers = []
    for guesses in ((), ("--speculative", "ngram")):
        with Server(*options, *guesses) as server:
            async with PipelineClient(server.run_dir) as client:
                answers.append(await all_answers(client))
            if guesses:
                await wait_for_accepted(server)
    assert answers[0] == answers[1]


async def test_every_answer_is_the_same_on_two_ranks_also_after_a_death(server: Server) -> None:
    async with PipelineClient(server.run_dir) as client:
        expected = await all_answers(client)
    assert expected["stopped"][0].num_output_tokens < LONG.max_tokens
    options = ("--tp", "2", "--vit", "1", "--dtype", "float32", "--speculative", "ngram", *LIMITS)
    with Server(*options) as guessing:
        async with PipelineClient(guessing.run_dir) as client:
            assert await all_answers(client) == expected
            await wait_for_accepted(guessing)
            await assert_deaths_change_nothing(guessing, client, expected, ("llm.0", "llm.1"))
        guessing.children = workers_of(guessing.process.pid)


async def test_a_models_own_head_changes_no_answer(tmp_path: Path) -> None:
    """On two ranks, with prefixes of states, also after a death. A dense model's head is in
    `tests/workers/llm/test_mtp.py`."""
    folder = make_agree(make_checkpoint(tmp_path, "qwen3_5_moe"), 0.02)
    options = ("--model", str(folder), "--vit", "1", "--dtype", "float32", *LIMITS)
    with Server(*options) as plain:
        async with PipelineClient(plain.run_dir) as client:
            expected = await all_answers(client)
        plain.children = workers_of(plain.process.pid)
    with Server(*options, "--tp", "2", "--speculative", "mtp") as guessing:
        async with PipelineClient(guessing.run_dir) as client:
            for _ in range(2):
                assert await all_answers(client) == expected
            await wait_for_accepted(guessing)
            await assert_deaths_change_nothing(guessing, client, expected, ("llm.1",))
        guessing.children = workers_of(guessing.process.pid)


def test_a_model_without_such_a_head_does_not_start() -> None:
    with Server("--speculative", "mtp", *LIMITS, expects_failure=True) as server:
        assert server.wait() == 1
        assert "speculative 'mtp' is not for this model: its family has no head" in server.output
