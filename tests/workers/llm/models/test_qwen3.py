"""The decoder of Qwen3-VL beside transformers' own in float32: dense and with experts, with features of
items, through every cut of a prompt, on every number of ranks."""

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
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pipeline.families.qwen3_vl import ExpertsInfo, Qwen3TextInfo
from tests.workers.llm.models.conftest import OnRanks
from workers.llm.attention.base import SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged, paged_of
from workers.llm.models.base import Decoder, Features
from workers.llm.models.experts import ExpertsMlp
from workers.llm.models.mlp import Mlp
from workers.llm.models.qwen3 import DECODER, Qwen3Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.weights.registry import open_weights

CPU = torch.device("cpu")
BLOCK, NUM_TOKENS, HIDDEN, NUM_FEATURES = 16, 80, 48, 2
# Two items: neighbours, so that a chunk may end between them, and inside each.
ITEMS = (range(5, 19), range(19, 40))
TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # so that four ranks share them
    "head_dim": 16,  # not hidden / heads
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [4, 2, 2]},
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "num_heads": 1,
    "intermediate_size": 16,
    "out_hidden_size": HIDDEN,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 4,
}
KINDS = ("dense", "experts", "experts one by one", "experts as published")


class Case(NamedTuple):
    folder: Path
    info: Qwen3TextInfo
    embeddings: Tensor  # [num item tokens, (1 + NUM_FEATURES) · hidden]
    expected: Tensor  # logits [NUM_TOKENS, vocab]

    def decoder(self, parallel: TensorParallel | None = None, attention: str = "torch") -> Qwen3Decoder:
        weights = open_weights(self.folder, torch.float32, CPU)
        kernels = choose_backend(attention, CPU).kernels
        return Qwen3Decoder(self.info, weights, parallel or TensorParallel(), kernels)


TOKENS = [(37 * number) % 311 for number in range(NUM_TOKENS)]
ROWS = torch.tensor([row for item in ITEMS for row in item])


def positions() -> Tensor:
    """[3, NUM_TOKENS], different in all three rows where items are."""
    found = torch.arange(NUM_TOKENS).expand(3, -1).clone()
    for item in ITEMS:
        count = torch.arange(len(item))
        found[:, item.start : item.stop] = item.start + torch.stack((count * 0, count // 5, count % 5))
    return found


def make_model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "dense":
        model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=VISION))
    else:
        config = Qwen3VLMoeConfig(text_config={**TEXT, **EXPERTS}, vision_config=VISION)
        model = Qwen3VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Lively: with small weights every decoder yields the same.
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model.eval()


def rewrite_experts(folder: Path, kind: str) -> None:
    """From the layout in which transformers saves them to another one."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensor = tensors.pop(name)
        assert tensor.shape[0] == EXPERTS["num_experts"], "saved as it is in memory"
        if kind == "experts as published":
            tensors[name] = tensor.mT.contiguous()
            continue
        module, last = name.rsplit(".", 1)
        names = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[last]
        for expert, matrix in enumerate(tensor):
            for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                tensors[f"{module}.{expert}.{part}.weight"] = rows.contiguous()
    save_file(tensors, folder / "model.safetensors")


def text_info(kind: str) -> Qwen3TextInfo:
    experts = ExpertsInfo(num_experts=4, num_chosen=2, intermediate_size=24, layers=(0, 2, 3))
    return Qwen3TextInfo(
        hidden_size=HIDDEN, intermediate_size=96, num_layers=4, num_heads=8, num_kv_heads=2, head_dim=16,
        vocab_size=320, rms_norm_eps=1e-6, rope_theta=5e4, mrope_section=(4, 2, 2),
        max_position_embeddings=512, tie_word_embeddings=False,
        num_features=NUM_FEATURES, experts=None if kind == "dense" else experts,
    )  # fmt: skip


@torch.inference_mode()
def reference(model: Any, embeddings: Tensor) -> Tensor:
    """By the text model, which takes embeddings and features as its tower would hand them over."""
    x = model.get_input_embeddings()(torch.tensor([TOKENS]))
    x[0, ROWS] = embeddings[:, :HIDDEN]
    mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    mask[0, ROWS] = True
    features = list(embeddings[:, HIDDEN:].split(HIDDEN, dim=1))
    hidden = model.model.language_model(
        inputs_embeds=x, position_ids=positions()[:, None], visual_pos_masks=mask,
        deepstack_visual_embeds=features, use_cache=False,
    ).last_hidden_state  # fmt: skip
    return model.lm_head(hidden)[0].clone()


@pytest.fixture(scope="module")
def make_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(kind: str) -> Case:
        folder = tmp_path_factory.mktemp("model")
        model = make_model(kind)
        model.save_pretrained(folder)
        if kind in KINDS[2:]:
            rewrite_experts(folder, kind)
        embeddings = torch.randn(len(ROWS), (1 + NUM_FEATURES) * HIDDEN)
        return Case(folder, text_info(kind), embeddings, reference(model, embeddings))

    return make


@torch.inference_mode()
def logits(
    decoder: Decoder,
    case: Case,
    chunk: int,
    attention: str = "torch",
    num_others: int = 0,
    num_tokens: int = NUM_TOKENS,
) -> Tensor:
    """Of the prompt's first tokens, computed in chunks. Behind other sequences' decodes in the same steps."""
    backend = choose_backend(attention, CPU)
    num_blocks = NUM_TOKENS // BLOCK
    spec = paged_of(decoder.cache_spec())
    cache = backend.attention(PagedTensors(spec, num_blocks + num_others, BLOCK, torch.float32, CPU))
    for tensor in cache.cache.tensors:
        tensor.zero_()
    found = []
    for start in range(0, num_tokens, chunk):
        stop = min(start + chunk, num_tokens)
        x = decoder.embed(torch.tensor([7] * num_others + TOKENS[start:stop]))
        inside = (start <= ROWS) & (stop > ROWS)
        features = None
        if inside.any():
            rows = ROWS[inside] - start + num_others
            x[rows] = case.embeddings[inside, :HIDDEN]
            features = Features(rows, case.embeddings[inside, HIDDEN:].unflatten(1, (NUM_FEATURES, -1)))
        of_others = torch.full((3, num_others), 3)
        spans = [SequencePart(1, 3, [num_blocks + number]) for number in range(num_others)]
        step = cache.plan([*spans, SequencePart(stop - start, start, list(reversed(range(num_blocks))))])
        hidden = decoder(x, torch.cat((of_others, positions()[:, start:stop]), dim=1), step, features)
        found.append(decoder.logits(hidden[num_others:]))
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, NUM_TOKENS])
def test_every_cut_of_the_prompt_is_what_transformers_computes(
    kind: str, chunk: int, make_case: Callable[[str], Case]
) -> None:
    case = make_case(kind)
    assert float(case.expected.std()) > 1, "the logits differ"
    decoder = case.decoder()
    torch.testing.assert_close(logits(decoder, case, chunk), case.expected, rtol=1e-4, atol=1e-4)


def test_features_and_rotation_matter(make_case: Callable[[str], Case]) -> None:
    """Else the tests above would pass without them."""
    case = make_case("dense")
    decoder = case.decoder()
    plain = case._replace(embeddings=case.embeddings.clone())
    plain.embeddings[:, -HIDDEN:] = 0
    assert float((logits(decoder, plain, NUM_TOKENS) - case.expected).abs().max()) > 0.1
    decoder._axes = decoder._axes.sort().values  # side by side
    assert float((logits(decoder, case, NUM_TOKENS) - case.expected).abs().max()) > 0.1


@pytest.mark.parametrize("kind", KINDS[:2])
def test_features_meet_their_rows_behind_other_sequences(kind: str, make_case: Callable[[str], Case]) -> None:
    case = make_case(kind)
    found = logits(case.decoder(), case, 7, num_others=3)
    torch.testing.assert_close(found, case.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize(("kind", "chunk"), [("dense", 24), ("experts", 13)])
def test_kernels_compute_the_same(kind: str, chunk: int, make_case: Callable[[str], Case]) -> None:
    """A sum is pending in the stream when features come. A chunk ends inside an item."""
    case = make_case(kind)
    found = logits(case.decoder(attention="triton"), case, chunk, "triton", num_others=2, num_tokens=24)
    torch.testing.assert_close(found, case.expected[:24], rtol=1e-4, atol=1e-4)


def test_which_layers_have_experts(make_case: Callable[[str], Case]) -> None:
    kinds = [type(layer.mlp) for layer in make_case("experts").decoder().layers]
    assert kinds == [ExpertsMlp, Mlp, ExpertsMlp, ExpertsMlp]


@pytest.mark.parametrize(
    ("kind", "has_whole_experts"),
    [("dense", False), *itertools.product(KINDS[1:], (False, True))],
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
        return logits(case.decoder(parallel), case, 33)

    for of_rank in on_ranks(size, has_whole_experts, run):
        torch.testing.assert_close(of_rank, case.expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_is_near(kind: str, make_case: Callable[[str], Case]) -> None:
    case = make_case(kind)
    weights = open_weights(case.folder, torch.float32, CPU, "int8")
    found = logits(Qwen3Decoder(case.info, weights, TensorParallel()), case, NUM_TOKENS)
    error = float((found - case.expected).norm() / case.expected.norm())
    assert 0 < error < 0.25


def test_what_cannot_be_shared_out_is_refused_before_it_is_loaded() -> None:
    dense, experts = text_info("dense"), text_info("experts")
    assert DECODER.spec_of(experts, 4) == [Paged(1, 16)] * 4
    DECODER.check_experts(dense, 4, False)
    DECODER.check_experts(experts, 4, True)
    DECODER.check_experts(experts, 8, False)
    with pytest.raises(ValueError, match="expert_parallel is for models with experts"):
        DECODER.check_experts(dense, 2, True)
    with pytest.raises(ValueError, match="tp 8 does not divide the model's 4 experts"):
        DECODER.check_experts(experts, 8, True)
    with pytest.raises(ValueError, match="tp 16 does not divide the intermediate size 24"):
        DECODER.check_experts(experts, 16, False)
