"""One tenant floods the server, another asks a small thing: through a real pipeline."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from pipeline.client.client import PipelineClient
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from tests.pictures import encode, noise
from tests.servers import Server

NUM_FLOOD = 48  # more than may be open of one tenant
MOST_STRETCHED = 5.0  # a small machine also computes the flood's steps meanwhile
TEXT = [ChatMessage("user", "Hello")]
PARTS = tuple(ImagePart(frame=index) for index in range(8))
PICTURES = [ChatMessage("user", (*PARTS, TextPart("What are they?")))]
LIMITS = ("--max-num-seqs", "4", "--max-open-requests", "32")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server("--dtype", "float32", "--vit", "1", *LIMITS) as served:
        yield served


async def ask(client: PipelineClient, tenant: str) -> float:
    """How long a small request takes."""
    start = time.monotonic()
    async for _ in client.generate(TEXT, SamplingParams(max_tokens=24, ignore_eos=True), tenant=tenant):
        pass
    return time.monotonic() - start


@pytest.mark.parametrize("has_pictures", [False, True], ids=["long answers", "pictures"])
async def test_a_flood_of_one_leaves_the_others_their_turns(server: Server, has_pictures: bool) -> None:
    media = [encode(noise(number, (224, 224))) for number in range(8)] if has_pictures else []
    statuses: list[int] = []
    num_begun = 0

    async def flood(client: PipelineClient) -> None:
        nonlocal num_begun
        sampling = SamplingParams(max_tokens=800, ignore_eos=True)
        try:
            chat = PICTURES if has_pictures else TEXT
            async with aclosing(client.generate(chat, sampling, media, tenant="key:flood")) as pieces:
                async for piece in pieces:
                    num_begun += piece.num_output_tokens == 1
        except RequestError as error:
            statuses.append(error.info.status)

    async with PipelineClient(server.run_dir) as flooder, PipelineClient(server.run_dir) as other:
        await ask(other, "key:other")
        quiet = statistics.median([await ask(other, "key:other") for _ in range(5)])
        floods = [asyncio.create_task(flood(flooder)) for _ in range(NUM_FLOOD)]
        async with asyncio.timeout(60):
            while num_begun < 4:
                await asyncio.sleep(0.02)
        beside = [await ask(other, "key:other") for _ in range(5)]
        assert not all(task.done() for task in floods), "the flood went on meanwhile"
        for task in floods:
            task.cancel()
        await asyncio.gather(*floods, return_exceptions=True)
    assert set(statuses) == {429}, "whoever has its share is told so"
    assert min(beside) <= MOST_STRETCHED * quiet, (quiet, beside)
