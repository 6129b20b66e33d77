"""The decoder of Qwen3.5 beside transformers' own in float32: dense and with experts, through every cut of a
prompt, on every number of ranks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

from pipeline.families.qwen3_5 import DeltaNetInfo, Qwen3_5TextInfo
from pipeline.families.qwen3_vl import ExpertsInfo
from tests.workers.llm.models.conftest import OnRanks
from workers.llm.attention.base import SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged, State, paged_of, states_of
from workers.llm.cache.state_tensors import StateTensors
from workers.llm.models.qwen3_5 import DECODER, Qwen3_5Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.weights.base import Linear
from workers.nn.weights.dense import HalfLinear, OneDnnLinear, SixteenBitLinear, TorchLinear
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
BLOCK, NUM_TOKENS, HIDDEN = 16, 144, 48
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # so that four ranks share them
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e4,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 96,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 1,
    "intermediate_size": 16,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 4,
}
DENSE = (TorchLinear, OneDnnLinear, HalfLinear, SixteenBitLinear)
KINDS = ("dense", "experts", "experts as published")
TOKENS = [(37 * number) % 311 for number in range(NUM_TOKENS)]
ITEM = range(5, 40)


class Case(NamedTuple):
    folder: Path
    info: Qwen3_5TextInfo
    expected: Tensor  # logits [NUM_TOKENS, vocab]

    def decoder(
        self, parallel: TensorParallel | None = None, attention: str = "torch", quantization: str = "none"
    ) -> Qwen3_5Decoder:
        weights = open_weights(self.folder, torch.float32, CPU, quantization)
        kernels = choose_backend(attention, CPU).kernels
        return Qwen3_5Decoder(self.info, weights, parallel or TensorParallel(), kernels)


def positions() -> Tensor:
    """[3, NUM_TOKENS], different in all three rows where an item is."""
    found = torch.arange(NUM_TOKENS).expand(3, -1).clone()
    count = torch.arange(len(ITEM))
    found[:, ITEM.start : ITEM.stop] = ITEM.start + torch.stack((count * 0, count // 5, count % 5))
    return found


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "dense":
        model: Any = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=TEXT, vision_config=VISION))
    else:
        config = Qwen3_5MoeConfig(text_config={**TEXT, **EXPERTS}, vision_config=VISION)
        model = Qwen3_5MoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Lively: with small weights every decoder yields the same.
            parameter.normal_(1.0 if "linear_attn.norm" in name else 0.0, 0.2)
    return model.eval()


def fuse_experts(folder: Path) -> None:
    """From three tensors for each expert, as transformers saves them, to two for all, as they are published
    for this family."""
    tensors = load_file(folder / "model.safetensors")
    modules = {name.rpartition(".experts.")[0] for name in tensors if ".experts." in name}
    for module in modules:
        experts = [f"{module}.experts.{number}" for number in range(4)]
        parts = {
            part: torch.stack([tensors.pop(f"{expert}.{part}.weight") for expert in experts])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up = torch.cat((parts["gate_proj"], parts["up_proj"]), dim=1)
        tensors[f"{module}.experts.gate_up_proj"] = gate_up
        tensors[f"{module}.experts.down_proj"] = parts["down_proj"]
    assert len(modules) == 4
    save_file(tensors, folder / "model.safetensors")


def text_info(kind: str) -> Qwen3_5TextInfo:
    experts = ExpertsInfo(num_experts=4, num_chosen=2, intermediate_size=24, layers=(0, 1, 2, 3))
    return Qwen3_5TextInfo(
        hidden_size=HIDDEN, intermediate_size=96, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16,
        vocab_size=320, rms_norm_eps=1e-6, rope_theta=5e4, mrope_section=(2, 1, 1),
        max_position_embeddings=512, tie_word_embeddings=False, full_layers=(1, 3), rotary_dim=8,
        delta_net=DeltaNetInfo(num_key_heads=4, num_value_heads=8, key_dim=8, value_dim=12, num_taps=4),
        experts=None if kind == "dense" else experts, num_mtp_layers=0,
    )  # fmt: skip


@torch.inference_mode()
def reference(model: Any) -> Tensor:
    x = model.get_input_embeddings()(torch.tensor([TOKENS]))
    hidden = model.model.language_model(
        inputs_embeds=x, position_ids=positions()[:, None], use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden)[0].clone()


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(kind: str) -> Case:
        folder = tmp_path_factory.mktemp("model")
        model = make_model(kind)
        model.save_pretrained(folder)
        if kind == "experts as published":
            fuse_experts(folder)
        return Case(folder, text_info(kind), reference(model))

    return make


@torch.inference_mode()
def logits(
    decoder: Qwen3_5Decoder,
    chunk: int,
    attention: str = "torch",
    num_others: int = 0,
    num_tokens: int = NUM_TOKENS,
) -> Tensor:
    """Of the prompt's first tokens, computed in chunks. Behind other sequences' decodes in the same steps."""
    backend, num_blocks, spec = choose_backend(attention, CPU), NUM_TOKENS // BLOCK, decoder.cache_spec()
    paged = PagedTensors(paged_of(spec), num_blocks + num_others, BLOCK, torch.float32, CPU)
    cache = backend.attention(paged)
    for tensor in paged.tensors:
        tensor.zero_()
    states = StateTensors(states_of(spec), num_others + 1, torch.float32, CPU)
    slots, found = torch.arange(num_others + 1), []
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        x = decoder.embed(torch.tensor([7] * num_others + TOKENS[start:stop]))
        spans = [SequencePart(1, 3, [num_blocks + number]) for number in range(num_others)]
        step = cache.plan([*spans, SequencePart(stop - start, start, list(reversed(range(num_blocks))))])
        counts, starts = [1] * num_others + [stop - start], [3] * num_others + [start]
        rows = torch.cat((torch.full((3, num_others), 3), positions()[:, start:stop]), dim=1)
        hidden = decoder(x, rows, step, states=states.of_step(slots, counts, starts))
        found.append(decoder.logits(hidden[num_others:]))
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 63, 64, 65, NUM_TOKENS])
def test_every_cut_of_the_prompt_is_what_transformers_computes(
    kind: str, chunk: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case(kind)
    assert float(case.expected.std()) > 0.5, "the logits differ"
    torch.testing.assert_close(logits(case.decoder(), chunk), case.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize(
    ("attention", "chunk", "num_tokens"),
    [
        ("native", 33, NUM_TOKENS),
        ("native", NUM_TOKENS, NUM_TOKENS),
        pytest.param("triton", 20, 30, marks=pytest.mark.interpreter),
    ],
)
def test_kernels_compute_the_same(
    attention: str, chunk: int, num_tokens: int, kind: str, make_case: Callable[[str], Case]
) -> None:
    """Behind other sequences."""
    case = make_case(kind)
    decoder = case.decoder(attention=attention)
    found = logits(decoder, chunk, attention, num_others=2, num_tokens=num_tokens)
    torch.testing.assert_close(found, case.expected[:num_tokens], rtol=1e-4, atol=1e-4)


def test_each_part_of_a_head_matters(make_case: Callable[[str], Case]) -> None:
    """Else the tests above would pass without rotation or gates."""
    case = make_case("dense")
    decoder = case.decoder()
    decoder._axes = decoder._axes.sort().values  # side by side
    assert float((logits(decoder, NUM_TOKENS) - case.expected).abs().max()) > 0.01
    decoder = case.decoder()
    decoder._frequencies = decoder._frequencies * 0
    assert float((logits(decoder, NUM_TOKENS) - case.expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("kind", "has_whole_experts"), [("dense", False), *itertools.product(KINDS[1:], (False, True))]
)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_compute_what_one_does(
    size: int,
    kind: str,
    has_whole_experts: bool,
    make_case: Callable[[str], Case],
    on_ranks: OnRanks,
) -> None:
    case = make_case(kind)

    def run(parallel: TensorParallel) -> Tensor:
        return logits(case.decoder(parallel), 65)

    for of_rank in on_ranks(size, has_whole_experts, run):
        torch.testing.assert_close(of_rank, case.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.3), ("int4", 1.0)])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_are_near(
    kind: str, size: int, quantization: str, bound: float, make_case: Callable[[str], Case], on_ranks: OnRanks
) -> None:
    """The projections of layers with a state included; on ranks, each with its own part in few bits."""
    case = make_case(kind)

    def run(parallel: TensorParallel) -> Tensor:
        decoder = case.decoder(parallel, quantization=quantization)
        assert not any(isinstance(layer, DENSE) for layer in projections(decoder, case.info))
        return logits(decoder, 65)

    errors = [
        float((of_rank - case.expected).norm() / case.expected.norm())
        for of_rank in on_ranks(size, False, run)
    ]
    assert 0 < min(errors) <= max(errors) < bound


def projections(decoder: Qwen3_5Decoder, info: Qwen3_5TextInfo) -> list[Linear]:
    """Of all layers' mixers, but for the gates of states, which have all their bits."""
    mixers = [layer.mixer for layer in decoder.layers]
    parts = [part for mixer in mixers for part in vars(mixer).items() if isinstance(part[1], Linear)]
    found = [linear for name, linear in parts if name != "_gates"]
    num_full = len(info.full_layers)
    assert len(found) == 3 * num_full + 2 * (info.num_layers - num_full)
    return found


def test_bfloat16_keeps_what_norms_have_beside_one(make_case: Callable[[str], Case]) -> None:
    """One and a small number in bfloat16 would be one: the sum is kept in float32."""
    weights = open_weights(make_case("dense").folder, torch.bfloat16, CPU)
    decoder = Qwen3_5Decoder(text_info("dense"), weights, TensorParallel())
    stored = load_file(make_case("dense").folder / "model.safetensors")
    wanted = stored["model.language_model.norm.weight"] + 1
    assert torch.equal(decoder.norm.weight, wanted)
    x = torch.randn(3, HIDDEN).bfloat16()
    normed = torch.nn.functional.rms_norm(x.float(), (HIDDEN,), wanted, 1e-6).bfloat16()
    assert torch.equal(decoder.norm(x), normed)


def test_each_layer_says_what_it_keeps() -> None:
    inputs, memory = State((3, 2 * 2 * 8 + 4 * 12), None), State((4, 8, 12), torch.float32)
    of_two_ranks = [inputs, memory, Paged(1, 16)] * 2
    assert DECODER.spec_of(text_info("dense"), 2) == of_two_ranks
    assert memory.nbytes(torch.bfloat16) == 4 * 8 * 12 * 4
    assert inputs.nbytes(torch.bfloat16) == 3 * 80 * 2


def test_what_cannot_be_shared_out_is_refused_before_it_is_loaded() -> None:
    dense, experts = text_info("dense"), text_info("experts")
    DECODER.check_experts(dense, 4, False)
    DECODER.check_experts(experts, 4, True)
    with pytest.raises(ValueError, match="expert_parallel is for models with experts"):
        DECODER.check_experts(dense, 2, True)
    with pytest.raises(ValueError, match="tp 8 does not divide the model's 4 experts"):
        DECODER.check_experts(experts, 8, True)
    with pytest.raises(ValueError, match="tp 8 does not divide the model's 4 key heads of linear attention"):
        DECODER.spec_of(dense, 8)
