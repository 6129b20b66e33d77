"""Which part of each weight every rank loads, on the meta device, at the shapes of the real models: Hugging
Face's own names and sizes."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from pipeline.adapters.tensors import usual_name
from pipeline.families import TextInfo
from pipeline.families.qwen3_5 import DeltaNetInfo, Qwen3_5TextInfo
from pipeline.families.qwen3_vl import ExpertsInfo, Qwen3TextInfo
from workers.llm.models.qwen2 import Qwen2Decoder
from workers.llm.models.qwen3 import Qwen3Decoder
from workers.llm.models.qwen3_5 import Qwen3_5Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.weights.dense import Dense
from workers.nn.weights.weights import Weights

NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES: dict[str, dict[str, Any]] = {
    "2B": dict(zip(NAMES, (1536, 8960, 28, 12, 2, 151936), strict=True)),
    "7B": dict(zip(NAMES, (3584, 18944, 28, 28, 4, 152064), strict=True)),
    "72B": dict(zip(NAMES, (8192, 29568, 80, 64, 8, 152064), strict=True)),
}
TIED = {"2B"}
FITTING = [
    ("2B", 1),
    ("2B", 2),
    ("2B", 4),
    ("7B", 1),
    ("7B", 2),
    ("7B", 4),
    ("72B", 1),
    ("72B", 2),
    ("72B", 4),
    ("72B", 8),
]


class Part(NamedTuple):
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: int | None = None  # of the matrices that a tensor stacks


class MetaCheckpoint:
    """Notes what is loaded; holds nothing."""

    dtype, device = torch.bfloat16, torch.device("meta")

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        self.loaded: list[tuple[str, Part]] = []

    def has(self, name: str) -> bool:
        return name in self.shapes

    def check_plain(self, name: str) -> None:
        """All are."""

    def type_of(self, name: str) -> str:
        return "BF16"

    def has_module(self, module: str) -> bool:
        return f"{module}.weight" in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.shapes[name])

    def load(
        self, name: str, rows: slice = slice(None), columns: slice | None = None, at: int | None = None
    ) -> Tensor:
        shape = self.shapes[name] if at is None else self.shapes[name][1:]
        picked_rows = rows.indices(shape[0])[:2]
        picked_columns = (columns or slice(None)).indices(shape[1])[:2] if len(shape) > 1 else (0, 1)
        self.loaded.append((name, Part(picked_rows, picked_columns, at)))
        sizes = [picked_rows[1] - picked_rows[0], picked_columns[1] - picked_columns[0]][: len(shape)]
        return torch.empty(sizes, dtype=self.dtype, device=self.device)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        start, stop = rows.indices(self.shapes[name][0])[:2]
        self.loaded.append((name, Part((start, stop), (0, (*self.shapes[name], 1)[1]))))
        return torch.empty(stop - start, *self.shapes[name][1:], device=self.device)


@functools.cache
def checkpoint_shapes(model: str) -> dict[str, torch.Size]:
    """The decoder's tensors of the real checkpoint, as Hugging Face's implementation has them."""
    config = Qwen2VLConfig(
        text_config=SHAPES[model],
        vision_config={"depth": 1},
        tie_word_embeddings=model in TIED,
    )
    with torch.device("meta"):
        made = Qwen2VLForConditionalGeneration(config)
    shapes = {usual_name(name): tensor.shape for name, tensor in made.named_parameters()}
    return {name: shape for name, shape in shapes.items() if not name.startswith("visual.")}


def text_info(model: str) -> TextInfo:
    shape = SHAPES[model]
    return TextInfo(
        hidden_size=shape["hidden_size"], intermediate_size=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"], num_kv_heads=shape["num_key_value_heads"], head_dim=128,
        vocab_size=shape["vocab_size"],
        rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24), max_position_embeddings=32768,
        tie_word_embeddings=model in TIED,
    )  # fmt: skip


def make_decoder(model: str, checkpoint: MetaCheckpoint, parallel: TensorParallel) -> Qwen2Decoder:
    weights = Weights(checkpoint, [Dense()])  # type: ignore[arg-type]
    return Qwen2Decoder(text_info(model), weights, parallel)


@pytest.mark.parametrize(("model", "size"), FITTING)
def test_every_tensor_is_loaded_exactly_once(model: str, size: int) -> None:
    shapes = checkpoint_shapes(model)
    ranks = []
    for rank in range(size):
        checkpoint = MetaCheckpoint(shapes)
        make_decoder(model, checkpoint, TensorParallel(rank, size))
        ranks.append(checkpoint.loaded)
    assert {name for name, _ in ranks[0]} == set(shapes), "each tensor of the checkpoint, and no other"
    embedding = "model.embed_tokens.weight"
    for name, shape in shapes.items():
        parts = [part for loaded in ranks for loaded_name, part in loaded if loaded_name == name]
        # whole on every rank, and where it is the output layer too that has its part of the same memory
        if name == embedding:
            assert parts == [Part((0, shape[0]), (0, shape[1]))] * size
            continue
        per_rank = [sum(loaded_name == name for loaded_name, _ in loaded) for loaded in ranks]
        assert set(per_rank) == {1}, f"{name} is read more than once"
        num_copies = (
            size
            if "norm" in name
            else max(1, size // SHAPES[model]["num_key_value_heads"])
            if ("k_proj" in name or "v_proj" in name)
            else 1
        )
        counts = Counter(parts)
        assert set(counts.values()) == {num_copies}, name
        assert covered(list(counts), shape), f"{name}: the parts {list(counts)} do not make {tuple(shape)}"


def covered(parts: list[Part], shape: torch.Size) -> bool:
    """Whether the parts lie side by side, by rows or by columns, from the first to the last, without gap or
    overlap."""
    whole = Part((0, shape[0]), (0, shape[1] if len(shape) > 1 else 1))
    for along, across in (("rows", "columns"), ("columns", "rows")):
        if all(getattr(part, across) == getattr(whole, across) for part in parts):
            ends = sorted(getattr(part, along) for part in parts)
            position = 0
            for start, stop in ends:
                if start != position:
                    return False
                position = stop
            return bool(position == getattr(whole, along)[1])
    return False


def published_experts(count: int, hidden: int, size: int) -> tuple[dict[str, torch.Size], Qwen3TextInfo]:
    """The shapes of a checkpoint of two layers at the sizes of the 30B-A3B, as published, and what its
    family reads."""
    experts = {"num_experts": count, "num_experts_per_tok": 8, "moe_intermediate_size": size}
    text = dict(zip(NAMES, (hidden, 6144, 2, 32, 4, 151936), strict=True))
    config = Qwen3VLMoeConfig(
        text_config={**text, **experts, "head_dim": 128, "mlp_only_layers": [0]}, vision_config={"depth": 1}
    )
    with torch.device("meta"):
        made = Qwen3VLMoeForConditionalGeneration(config)
    shapes = {usual_name(name): tensor.shape for name, tensor in made.named_parameters()}
    decoder = {name: shape for name, shape in shapes.items() if not name.startswith("visual.")}
    turned = {
        name: torch.Size((shape[0], shape[2], shape[1])) if ".experts." in name else shape
        for name, shape in decoder.items()
    }
    info = Qwen3TextInfo(
        hidden_size=hidden, intermediate_size=6144, num_layers=2, num_heads=32, num_kv_heads=4, head_dim=128,
        vocab_size=151936, rms_norm_eps=1e-6, rope_theta=5e6, mrope_section=(24, 20, 20),
        max_position_embeddings=262144, tie_word_embeddings=False, num_features=3,
        experts=ExpertsInfo(num_experts=count, num_chosen=8, intermediate_size=size, layers=(1,)),
    )  # fmt: skip
    return turned, info


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("has_whole_experts", [False, True])
def test_experts_are_loaded_exactly_once(size: int, has_whole_experts: bool) -> None:
    """Each element of each expert by one rank; everything else as in other decoders."""
    shapes, info = published_experts(128, 2048, 768)
    names = {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    assert {name for name in shapes if ".experts." in name} == names
    loaded: list[tuple[str, Part]] = []
    for rank in range(size):
        checkpoint = MetaCheckpoint(shapes)
        parallel = TensorParallel(rank, size, has_whole_experts=has_whole_experts)
        Qwen3Decoder(info, Weights(checkpoint, [Dense()]), parallel)  # type: ignore[arg-type]
        assert {name for name, _ in checkpoint.loaded} == set(shapes)
        of_rank = {part.at for name, part in checkpoint.loaded if name in names}
        assert len(of_rank) == (128 // size if has_whole_experts else 128)
        loaded += checkpoint.loaded
    for name in names:
        for expert in range(128):
            parts = [part for other, part in loaded if other == name and part.at == expert]
            assert covered(parts, shapes[name][1:]), (name, expert, parts)


HYBRID = Qwen3_5TextInfo(
    hidden_size=2560, intermediate_size=9216, num_layers=4, num_heads=16, num_kv_heads=4, head_dim=256,
    vocab_size=248_320, rms_norm_eps=1e-6, rope_theta=1e7, mrope_section=(11, 11, 10),
    max_position_embeddings=262_144, tie_word_embeddings=False, full_layers=(3,), rotary_dim=64,
    delta_net=DeltaNetInfo(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, num_taps=4),
    experts=None, num_mtp_layers=0,
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_parts_of_a_hybrid_are_loaded_exactly_once(size: int) -> None:
    """Queries, keys and values of one tensor each in parts of its own, and so are queries and their gates."""
    text = {
        "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 4, "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }  # fmt: skip
    with torch.device("meta"):
        made = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config={"depth": 1}))
    shapes = {usual_name(name): tensor.shape for name, tensor in made.named_parameters()}
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("visual.")}
    loaded: list[tuple[str, Part]] = []
    for rank in range(size):
        checkpoint = MetaCheckpoint(shapes)
        weights = Weights(checkpoint, [Dense()])  # type: ignore[arg-type]
        Qwen3_5Decoder(HYBRID, weights, TensorParallel(rank, size))
        assert {name for name, _ in checkpoint.loaded} == set(shapes), "each tensor, and no other"
        loaded += checkpoint.loaded
    for name, shape in shapes.items():
        parts = Counter(part for other, part in loaded if other == name)
        is_whole = "norm" in name or "embed_tokens" in name
        num_copies = (
            size
            if is_whole
            else max(1, size // 4)
            if name.endswith(("k_proj.weight", "v_proj.weight"))
            else 1
        )
        assert set(parts.values()) == {num_copies}, name
        assert covered(list(parts), shape), f"{name}: {list(parts)}"


@pytest.mark.parametrize(
    ("model", "size", "words"),
    [("2B", 8, "tp 8 .* 12 attention heads"), ("7B", 8, "tp 8 .* 28 attention heads")],
)
def test_heads_that_do_not_divide_are_refused_with_the_numbers(model: str, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_decoder(model, MetaCheckpoint(checkpoint_shapes(model)), TensorParallel(0, size))
