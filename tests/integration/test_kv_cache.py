"""Keys and values in 8 bits through the whole pipeline: two ranks, guesses, a picture, a cached prefix."""

from __future__ import annotations

import re

import aiohttp
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.client.client import PipelineClient
from pipeline.families import read_model_info
from tests.chats import GREEDY, ChatTurns, to_messages
from tests.engine_rig import Rig
from tests.pictures import scene
from tests.servers import Server
from workers.llm.cache.kv_formats import INT8
from workers.llm.cache.plan import GIB
from workers.llm.cache.spec import token_bytes
from workers.llm.models.registry import decoder_of

FIRST: ChatTurns = [("user", [scene(8, (224, 168)), "What is in this picture?"])]
TURNS: dict[str, ChatTurns] = {
    "first": FIRST,
    "second": [*FIRST, ("assistant", ["A red circle."]), ("user", ["What shape is it? Say it again."])],
}
CACHE_GIB, BLOCK = 0.002, 16
OPTIONS = (
    "--kv-cache-dtype", "int8", "--dtype", "float32", "--tp", "2", "--vit", "1", "--speculative", "ngram",
    "--kv-cache-gib", str(CACHE_GIB), "--embedding-pool-mib", "8", "--pixel-pool-mib", "8",
)  # fmt: skip


def expected_tokens() -> dict[str, list[int]]:
    """By torch's operators in one process, without a cached prefix."""
    found = {}
    for name, chat in TURNS.items():
        rig = Rig(EMBEDDED / "model", 512, kv_cache_dtype="int8")
        rig.open_pool()
        request, ready = rig.request(chat, name)
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
        rig.run()
        found[name] = rig.tokens(name)
    return found


async def test_answers_are_those_of_one_process() -> None:
    expected = expected_tokens()
    tokens, num_cached = {}, {}
    with Server(*OPTIONS) as server:
        async with PipelineClient(server.run_dir) as client:
            for name, chat in TURNS.items():
                messages, media = to_messages(chat)
                pieces = [piece async for piece in client.generate(messages, GREEDY, media)]
                tokens[name] = [token for piece in pieces for token in piece.token_ids]
                num_cached[name] = pieces[-1].num_cached_tokens
        async with aiohttp.ClientSession() as session, session.get(f"{server.url}/metrics") as response:
            metrics = await response.text()
        output = server.output
    assert tokens == expected
    assert num_cached["first"] == 0
    assert num_cached["second"] >= 2 * BLOCK, "a prefix is found in the cache"
    info = read_model_info(EMBEDDED / "model")
    of_token = token_bytes(decoder_of(info).spec_of(info.text, 2), torch.float32, INT8)
    num_blocks = int(CACHE_GIB * GIB) // (BLOCK * of_token)
    (shown,) = re.findall(r"^vlm_kv_blocks(?:\{[^}]*\})? (\S+)$", metrics, re.MULTILINE)
    assert float(shown) == num_blocks
    assert f"for {num_blocks * BLOCK} tokens in int8" in output
    assert f"keys and values in int8 cost the embedded model {INT8.loss}" in output
