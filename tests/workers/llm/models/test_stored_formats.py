"""Decoders of all families from quantised checkpoints: logits and greedy tokens are those of the dense
checkpoint that the maker's formula makes of the same files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.families import read_model_info
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.dequantised import dequantise
from tests.workers.llm.models.conftest import OnRanks
from tools.random_checkpoint.quantized import RECIPES, quantize_checkpoint
from workers.llm.attention.base import SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import paged_of, states_of
from workers.llm.cache.state_tensors import StateTensors
from workers.llm.models.registry import decoder_of
from workers.llm.parallel import TensorParallel
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
NUM_PROMPT, NUM_TOKENS = 24, 8
GROUP = 16  # divides the experts' 80 and 112
SERVED = [name for name in RECIPES if name not in ("nvfp4", "gguf")]
# What differs for the families: layers that are fused here, experts, layers with a state.
OF_EACH_FAMILY = ("fp8-block", "awq", "gptq-desc-act", "gptq-mlp", "compressed-mixed")
CASES = [
    *(("qwen3_5_moe", format) for format in SERVED),
    *((family, format) for family in FAMILIES for format in OF_EACH_FAMILY if family != "qwen3_5_moe"),
    ("qwen3_vl_moe", "fp8-block-stacked"),
]


Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Make:
    # Larger weights would amplify the last digits of float32 beyond what is allowed here.
    return functools.cache(lambda family: make_checkpoint(tmp_path_factory.mktemp(family), family, scale=2.0))


@torch.inference_mode()
def compute(folder: Path, parallel: TensorParallel | None = None) -> tuple[Tensor, list[int]]:
    """Logits of a prompt and of greedy tokens behind it, and these tokens."""
    info = read_model_info(folder)
    weights = open_weights(folder, torch.float32, CPU)
    decoder = decoder_of(info)(info.text, weights, parallel or TensorParallel())
    spec, blocks = decoder.cache_spec(), list(range(-(-(NUM_PROMPT + NUM_TOKENS) // 16)))
    paged = PagedTensors(paged_of(spec), len(blocks), 16, torch.float32, CPU)
    cache = choose_backend("torch", CPU).attention(paged)
    has_states = bool(states_of(spec))
    states = StateTensors(states_of(spec), 1, torch.float32, CPU)
    found: list[Tensor] = []
    tokens = [(37 * number) % 311 + 300 for number in range(NUM_PROMPT)]
    start = 0
    while len(tokens) < NUM_PROMPT + NUM_TOKENS:
        part = tokens[start:]
        step = cache.plan([SequencePart(len(part), start, blocks)])
        of_step = states.of_step(torch.arange(1), [len(part)], [start]) if has_states else None
        positions = torch.arange(start, start + len(part)).expand(3, -1)
        hidden = decoder(decoder.embed(torch.tensor(part)), positions, step, states=of_step)
        found.append(decoder.logits(hidden).clone())
        start = len(tokens)
        tokens.append(int(found[-1][-1].argmax()))
    return torch.cat(found), tokens[NUM_PROMPT:]


@pytest.mark.parametrize(("family", "format"), CASES)
def test_logits_and_tokens(family: str, format: str, dense: Make, tmp_path: Path, on_ranks: OnRanks) -> None:
    quantised = quantize_checkpoint(dense(family), tmp_path / "q", format, GROUP)
    expected, tokens = compute(dequantise(quantised, tmp_path / "d"))
    found, mine = compute(quantised)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert mine == tokens
    assert len(set(tokens)) > 1
    for of_rank in on_ranks(2, False, lambda parallel: compute(quantised, parallel)[0]):
        torch.testing.assert_close(of_rank, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", ["fp8-block-stacked", "awq"])
def test_whole_experts_on_each_rank(format: str, dense: Make, tmp_path: Path, on_ranks: OnRanks) -> None:
    quantised = quantize_checkpoint(dense("qwen3_vl_moe"), tmp_path / "q", format, GROUP)
    expected, _ = compute(quantised)
    for of_rank in on_ranks(2, True, lambda parallel: compute(quantised, parallel)[0]):
        torch.testing.assert_close(of_rank, expected, rtol=0, atol=1e-4)
