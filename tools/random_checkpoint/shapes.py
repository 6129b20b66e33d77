"""The numbers by which models of a family differ, under the names that `config.json` gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Numbers = Mapping[str, Any]
# Ids of the tokenizer that a small shape has in common with the embedded model.
SMALL_VOCABULARY, LARGE_VOCABULARY, LARGEST_VOCABULARY = 4224, 151_936, 152_064
NEW_VOCABULARY = 248_320  # of Qwen3.5, with other ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    family: str  # the `model_type`
    text: Numbers
    vision: Numbers
    is_tied: bool = False  # input and output embeddings are one
    vocab_size: int = LARGE_VOCABULARY

    @property
    def has_small_vocabulary(self) -> bool:
        return self.vocab_size < LARGE_VOCABULARY

    @property
    def head_dim(self) -> int:
        """Of layers that attend to all tokens."""
        found = self.text.get("head_dim") or self.text["hidden_size"] // self.text["num_attention_heads"]
        return int(found)

    def with_layers(self, num_layers: int) -> Shape:
        """The same with fewer layers of text. Raises ValueError where deepstack adds to more of them."""
        least = max(1, len(self.vision.get("deepstack_visual_indexes", ())))
        if not least <= num_layers <= self.text["num_hidden_layers"]:
            most = self.text["num_hidden_layers"]
            raise ValueError(f"this shape has from {least} to {most} layers, not {num_layers}")
        text = {**self.text, "num_hidden_layers": num_layers}
        if "layer_types" in text:
            text["layer_types"] = text["layer_types"][:num_layers]
        return dataclasses.replace(self, text=text)


@dataclass(frozen=True, slots=True)
class _Text:
    """Numbers that all decoders have, in the order in which model cards list them."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    further: Numbers = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        names = (item.name for item in dataclasses.fields(self) if item.name != "further")
        return {**{name: getattr(self, name) for name in names}, **self.further}


def _qwen2_vl(text: _Text, depth: int, embed_dim: int, num_heads: int, **options: Any) -> Shape:
    vision = {
        "depth": depth,
        "embed_dim": embed_dim,
        "num_heads": num_heads,
        "hidden_size": text.hidden_size,
        "mlp_ratio": 4,
    }
    return Shape(family="qwen2_vl", text=text.numbers(), vision=vision, **options)


def _qwen2_5_vl(text: _Text, intermediate_size: int, **options: Any) -> Shape:
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": intermediate_size,
        "num_heads": 16,
        "out_hidden_size": text.hidden_size,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return Shape(family="qwen2_5_vl", text=text.numbers(), vision=vision, **options)


SMALL_TOWER = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
LARGE_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
TINY_TOWER = {
    "depth": 4,
    "hidden_size": 144,
    "intermediate_size": 272,
    "num_heads": 2,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}


def _qwen3_vl(text: _Text, tower: Numbers, **options: Any) -> Shape:
    numbers = {"head_dim": 128, **text.numbers()}
    vision = {**tower, "out_hidden_size": text.hidden_size}
    return Shape(family="qwen3_vl", text=numbers, vision=vision, **options)


def _qwen3_vl_moe(
    text: _Text,
    num_experts: int,
    num_chosen: int,
    moe_intermediate_size: int,
    tower: Numbers = LARGE_TOWER,
    dense_layers: tuple[int, ...] = (),
    **options: Any,
) -> Shape:
    numbers = {
        "head_dim": 128,
        **text.numbers(),
        "num_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "moe_intermediate_size": moe_intermediate_size,
        "mlp_only_layers": list(dense_layers),
    }
    vision = {**tower, "out_hidden_size": text.hidden_size}
    return Shape(family="qwen3_vl_moe", text=numbers, vision=vision, **options)


def _qwen3_5(
    text: _Text,
    num_value_heads: int,
    tower: Numbers,
    of_states: Numbers | None = None,
    experts: Numbers | None = None,
    **options: Any,
) -> Shape:
    """Every fourth layer attends to all tokens. `of_states`: of the other layers, where not as published."""
    kinds = [
        "full_attention" if number % 4 == 3 else "linear_attention"
        for number in range(text.num_hidden_layers)
    ]
    numbers = {
        "head_dim": 256,
        **text.numbers(),
        "full_attention_interval": 4,
        "layer_types": kinds,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": num_value_heads,
        "linear_value_head_dim": 128,
        **(of_states or {}),
        **(experts or {}),
    }
    if experts is not None:
        del numbers["intermediate_size"]
    vision = {**tower, "deepstack_visual_indexes": [], "out_hidden_size": text.hidden_size}
    family = "qwen3_5" if experts is None else "qwen3_5_moe"
    return Shape(family=family, text=numbers, vision=vision, **{"vocab_size": NEW_VOCABULARY, **options})


def _shared_experts(num_experts: int, num_chosen: int, size: int) -> Numbers:
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": num_chosen,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": size,
    }


SMALLEST_TOWER = {
    "depth": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_heads": 12,
    "num_position_embeddings": 2304,
}
_TINY_STATES = {"linear_key_head_dim": 32, "linear_num_key_heads": 2, "linear_value_head_dim": 32}
_TINY = _Text(3, 256, 4, 2, 512)
_NARROW = _Text(3, 256, 6, 2, 512, {"head_dim": 64})  # 6 · 64 is not 256
_SMALL: dict[str, Any] = {"is_tied": True, "vocab_size": SMALL_VOCABULARY}
SHAPES: Mapping[str, Shape] = {
    "tiny": _qwen2_vl(_Text(2, 256, 4, 2, 512), 2, 160, 2, **_SMALL),
    # The encoder of 0.3b beside a language model that costs next to nothing: what is timed is the ViTs' work.
    "vision": _qwen2_vl(_Text(2, 256, 4, 2, 512), 16, 640, 8, is_tied=True),
    "0.3b": _qwen2_vl(_Text(12, 768, 6, 2, 3072), 16, 640, 8, is_tied=True),
    "2b": _qwen2_vl(_Text(28, 1536, 12, 2, 8960), 32, 1280, 16, is_tied=True),
    "7b": _qwen2_vl(_Text(28, 3584, 28, 4, 18_944), 32, 1280, 16, vocab_size=LARGEST_VOCABULARY),
    "qwen2.5-vl-tiny": Shape(
        family="qwen2_5_vl",
        text=_TINY.numbers(),
        vision={
            "depth": 4,
            "hidden_size": 160,
            "intermediate_size": 340,
            "num_heads": 2,
            "out_hidden_size": 256,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        **_SMALL,
    ),
    "qwen2.5-vl-3b": _qwen2_5_vl(_Text(36, 2048, 16, 2, 11_008), 3420, is_tied=True),
    "qwen2.5-vl-7b": _qwen2_5_vl(_Text(28, 3584, 28, 4, 18_944), 3420, vocab_size=LARGEST_VOCABULARY),
    "qwen2.5-vl-32b": _qwen2_5_vl(_Text(64, 5120, 40, 8, 27_648), 3456, vocab_size=LARGEST_VOCABULARY),
    "qwen2.5-vl-72b": _qwen2_5_vl(_Text(80, 8192, 64, 8, 29_568), 3456, vocab_size=LARGEST_VOCABULARY),
    "qwen3-vl-tiny": _qwen3_vl(_NARROW, TINY_TOWER, **_SMALL),
    "qwen3-vl-2b": _qwen3_vl(_Text(28, 2048, 16, 8, 6144), SMALL_TOWER, is_tied=True),
    "qwen3-vl-4b": _qwen3_vl(_Text(36, 2560, 32, 8, 9728), SMALL_TOWER, is_tied=True),
    "qwen3-vl-8b": _qwen3_vl(_Text(36, 4096, 32, 8, 12_288), LARGE_TOWER),
    "qwen3-vl-32b": _qwen3_vl(_Text(64, 5120, 64, 8, 25_600), LARGE_TOWER),
    "qwen3-vl-moe-tiny": _qwen3_vl_moe(_NARROW, 4, 2, 192, TINY_TOWER, (1,), **_SMALL),
    # For benchmarks on a small machine: one sixteenth of the experts for a token, in less than 6 GB.
    "moe-64": _qwen3_vl_moe(_Text(20, 1024, 16, 4, 3072), 64, 4, 512, SMALL_TOWER),
    "qwen3-vl-30b-a3b": _qwen3_vl_moe(_Text(48, 2048, 32, 4, 6144), 128, 8, 768),
    "qwen3.5-tiny": _qwen3_5(
        _Text(4, 256, 6, 2, 512, {"head_dim": 64}), 4, TINY_TOWER, _TINY_STATES, **_SMALL
    ),
    "qwen3.5-moe-tiny": _qwen3_5(
        _Text(4, 256, 6, 2, 0, {"head_dim": 64}),
        4,
        TINY_TOWER,
        _TINY_STATES,
        _shared_experts(4, 2, 192),
        **_SMALL,
    ),
    "qwen3.5-0.8b": _qwen3_5(_Text(24, 1024, 8, 2, 3584), 16, SMALLEST_TOWER, is_tied=True),
    "qwen3.5-9b": _qwen3_5(_Text(32, 4096, 16, 4, 12_288), 32, LARGE_TOWER),
    "qwen3.5-27b": _qwen3_5(_Text(64, 5120, 24, 4, 17_408), 48, LARGE_TOWER),
    "qwen3.5-35b-a3b": _qwen3_5(
        _Text(40, 2048, 16, 2, 0), 32, LARGE_TOWER, experts=_shared_experts(256, 8, 512)
    ),
    "qwen3-vl-235b-a22b": _qwen3_vl_moe(_Text(94, 4096, 64, 4, 12_288), 128, 8, 1536),
}
