"""Activations in 8 bits through the whole pipeline: a server computes what one process does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.client.client import PipelineClient
from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.sampling import SamplingParams
from tests.chats import CHATS, to_messages
from tests.engine_rig import Rig
from tests.integration.conftest import LIMITS
from tests.servers import Server
from tools.random_checkpoint.quantized import quantize_checkpoint
from workers.nn.native.grouped_rows import grouped_versions

CHAT = CHATS["system and text"]
SAMPLING = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)


def values(found: list[TokenLogprobs]) -> npt.NDArray[np.float32]:
    return np.concatenate([np.frombuffer(one.logprobs, dtype="<f4") for one in found])


def distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    return float(np.abs(one - other).mean())


def of_one_process(folder: Path, activations: str) -> npt.NDArray[np.float32]:
    rig = Rig(folder, 512, attention="native", activation_quantization=activations)
    request, _ = rig.request(CHAT, "r", sampling=SAMPLING)
    rig.engine.handle(request, rig.now)
    rig.run()
    return values([one for output in rig.outputs() for one in output.logprobs])


@pytest.mark.skipif(not grouped_versions(), reason="needs a processor with the kernels")
async def test_a_server_multiplies_as_its_option_says(tmp_path: Path) -> None:
    folder = quantize_checkpoint(EMBEDDED / "model", tmp_path / "q", "compressed-w8a8")
    rounded, exact = (of_one_process(folder, activations) for activations in ("int8", "none"))
    options = "--dtype", "float32", "--activation-quantization", "int8", "--vit", "1", *LIMITS
    with Server("--model", str(folder), *options) as server:
        async with PipelineClient(server.run_dir) as client:
            messages, media = to_messages(CHAT)
            pieces = [piece async for piece in client.generate(messages, SAMPLING, media)]
    found = values([one for piece in pieces for one in piece.logprobs])
    # Mostly equal; but what lies between two of its 8 bits may go the other way on other threads.
    assert distance(rounded, exact) > 0.02
    assert distance(found, rounded) < distance(found, exact) / 2
