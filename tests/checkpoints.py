"""Checkpoints for tests: random weights, other dimensions than the embedded model, the embedded model's
vocabulary, and a chat template.

The weights are large enough that greedy text is lively: with the usual 0.02 it repeats one token whatever
the picture shows, and a test on that proves nothing. Biases and the weights of norms are random, too: a model
that leaves one out must show it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from launcher.checkpoints import EMBEDDED
from tools.random_checkpoint.settings import PATCHES_14, PATCHES_16
from tools.random_checkpoint.tokenizer import chat_template
from tools.random_checkpoint.weights import FUSED_EXPERTS

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [2, 3, 3]},
}
# 8 heads of 16 are not the hidden size; the sections, interleaved, leave two frequencies over for time.
QWEN3_TEXT = {
    **TEXT,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 50_000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}
# A head of 24 numbers is no power of two, as the 72 of the published tower. Two of four have deepstack.
QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_heads": 4,
    "out_hidden_size": 192,
    "num_position_embeddings": 36,
    "deepstack_visual_indexes": [0, 2],
}
# Layers of both kinds, two value heads for each key head, and a quarter of each head turned.
QWEN3_5_TEXT = {
    **QWEN3_TEXT,
    "num_hidden_layers": 5,
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 50_000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
    },
}
SHARED_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 80,
    "shared_expert_intermediate_size": 112,
}
PLAIN_VISION = {name: value for name, value in QWEN3_VISION.items() if not name.startswith("deepstack")}
NUMBERS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": (TEXT, {"depth": 3, "embed_dim": 96, "num_heads": 3, "hidden_size": 192, "mlp_ratio": 3}),
    "qwen2_5_vl": (
        {**TEXT, "rms_norm_eps": 1e-6},
        # Windows of 2 · 2 tokens in two layers, all of a frame in one of the middle and in the last.
        {
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 180,
            "num_heads": 3,
            "out_hidden_size": 192,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
    ),
    "qwen3_vl": (QWEN3_TEXT, QWEN3_VISION),
    "qwen3_vl_moe": ({**QWEN3_TEXT, **EXPERTS}, QWEN3_VISION),
    "qwen3_5": (QWEN3_5_TEXT, PLAIN_VISION),
    "qwen3_5_moe": ({**QWEN3_5_TEXT, **SHARED_EXPERTS}, PLAIN_VISION),
}


def make_checkpoint(
    folder: Path,
    family: str = "qwen2_vl",
    seed: int = 0,
    scale: float = 5.0,
    processor: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model in `folder`, as Hugging Face saves it, its weights in `dtype`.

    `processor`: settings of pictures in place of the usual ones.
    """
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(_config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                parameter.normal_(0, 2)  # beside patches of that size
            elif _is_zero_centred(family, name):
                low, high = (0, 2) if name.endswith(("q_norm.weight", "k_norm.weight")) else (-0.5, 0.5)
                parameter.uniform_(low, high)
            elif parameter.ndim > 1:
                parameter.mul_(scale)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.uniform_(1, 3)  # heads that look at few tokens
            elif name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)  # all of these are of norms
            else:
                parameter.normal_(0, 0.5)
    model.to(dtype).save_pretrained(folder)
    if family == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    if family.startswith("qwen3_5"):
        _add_mtp(folder / "model.safetensors", scale)
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    (folder / "chat_template.jinja").write_text(_chat_template(family))
    for name, content in _processors(family, processor).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def _is_zero_centred(family: str, name: str) -> bool:
    """Whether one is added to the weight of this norm."""
    is_of_text = family.startswith("qwen3_5") and "language_model" in name
    return is_of_text and name.endswith("norm.weight") and "linear_attn" not in name


def _add_mtp(path: Path, scale: float) -> None:
    """The head that predicts a further token, as the hub's files have it: transformers leaves it out. Random,
    so that it is never right."""
    tensors = load_file(path)
    layer = next(name for name in tensors if name.endswith("self_attn.q_proj.weight"))
    prefix = layer.removesuffix("self_attn.q_proj.weight")
    size = tensors[f"{prefix}input_layernorm.weight"].shape[0]
    made = {
        f"mtp.layers.0.{name.removeprefix(prefix)}": torch.randn_like(tensor) * 0.02 * scale
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    made |= {f"mtp.{name}.weight": torch.rand(size) - 0.5 for name in norms}
    made["mtp.fc.weight"] = torch.randn(size, 2 * size) * 0.02 * scale
    dtype = tensors[layer].dtype
    made = {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}
    save_file({**tensors, **made}, path, metadata={"format": "pt"})


def _transpose_experts(path: Path) -> None:
    """The hub has them as [experts, inputs, outputs]. transformers 5 reads both, and saves the other."""
    tensors = load_file(path)
    fused = [name for name in tensors if name.endswith(FUSED_EXPERTS)]
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in fused}
    save_file(tensors, path, metadata={"format": "pt"})


def _chat_template(family: str) -> str:
    """Of Qwen2-VL the embedded model's, which has no default system prompt: tests count on short prompts."""
    if family == "qwen2_vl":
        return (EMBEDDED / "model" / "chat_template.jinja").read_text()
    return chat_template(family)


def _config(family: str) -> Any:
    embedded = json.loads((EMBEDDED / "model" / "config.json").read_text())
    shared = embedded["text_config"]
    ids = {name: shared[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    tokens = {
        name: embedded[name]
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    text, vision = NUMBERS[family]
    return AutoConfig.for_model(family, text_config={**text, **ids}, vision_config=dict(vision), **tokens)


def _processors(family: str, of_pictures: dict[str, int] | None) -> dict[str, dict[str, Any]]:
    if not family.startswith("qwen3"):
        limits = of_pictures or {"min_pixels": 28 * 28, "max_pixels": 560 * 560}
        return {"preprocessor_config.json": {**PATCHES_14, **limits}}
    size = {"shortest_edge": 32 * 32, "longest_edge": 560 * 560}
    # The limits are of all frames together: the largest of the tests' videos is above.
    of_videos = {"shortest_edge": 4096, "longest_edge": 120_000}
    return {
        "preprocessor_config.json": {"size": size, **PATCHES_16, **(of_pictures or {})},
        "video_preprocessor_config.json": {"size": of_videos, **PATCHES_16},
    }
