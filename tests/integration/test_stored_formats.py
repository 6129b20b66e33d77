"""A quantised checkpoint through the whole pipeline, on two ranks, with a quantised tower, which
onnxruntime computes. Greedy tokens are those of Hugging Face's model of the dequantised files."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from pipeline.client.client import PipelineClient
from pipeline.wire.sampling import SamplingParams
from tests.chats import generate, to_messages
from tests.checkpoints import make_checkpoint
from tests.dequantised import dequantise
from tests.family_chats import FAMILY_CHATS
from tests.integration.conftest import LIMITS
from tests.reference import Reference, assert_same_tokens
from tests.servers import Server
from tools.processes import workers_of
from tools.random_checkpoint.quantized import quantize_checkpoint

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
CHATS = {name: FAMILY_CHATS[name] for name in ("one picture", "a video")}


async def test_tokens_before_and_behind_kills(tmp_path: Path) -> None:
    dense = make_checkpoint(tmp_path / "m", "qwen3_5_moe")
    folder = quantize_checkpoint(dense, tmp_path / "q", "compressed-fp8-tower")
    reference = Reference(dequantise(folder, tmp_path / "d"))
    answers = {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}
    options = ("--dtype", "float32", *LIMITS, "--tp", "2", "--vit-engine", "onnxruntime")
    with Server("--model", str(folder), *options, "--cache-dir", str(tmp_path / "c")) as server:
        async with PipelineClient(server.run_dir) as client:
            for victim in ("", "vit.0", "llm.1"):
                together = [
                    asyncio.create_task(generate(client, *to_messages(chat), GREEDY))
                    for chat in CHATS.values()
                ]
                if victim:
                    await asyncio.sleep(0.1)
                    os.kill(workers_of(server.process.pid)[victim], signal.SIGKILL)
                for (name, answer), task in zip(answers.items(), together, strict=True):
                    tokens, _ = await asyncio.wait_for(task, 120)
                    assert_same_tokens(tokens, answer, f"{name}, killed: {victim}")
        server.children = workers_of(server.process.pid)
