"""The JSON files of a checkpoint, with the keys and the layout that the hub has for its family.

Qwen2-VL and Qwen2.5-VL have the text's numbers at the top of `config.json`, Qwen3-VL in `text_config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.random_checkpoint.shapes import Shape
from tools.random_checkpoint.tokenizer import first_special_id

ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}
PATCHES_14 = {
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
PATCHES_16 = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
# Of a picture. What was measured with random checkpoints of Qwen2-VL had transformers' limit, 1280 tokens.
MAX_PIXELS_14 = {"qwen2_vl": 28 * 28 * 1280, "qwen2_5_vl": 12_845_056}
SAMPLING: Mapping[str, Mapping[str, float]] = {
    "qwen2_vl": {"temperature": 0.01, "top_p": 0.001, "top_k": 1},
    "qwen2_5_vl": {"temperature": 1e-6, "repetition_penalty": 1.05},
    "qwen3_vl": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0},
    "qwen3_vl_moe": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.0},
    "qwen3_5": {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
    "qwen3_5_moe": {"temperature": 1.0, "top_p": 0.95, "top_k": 20},
}


def write_settings(folder: Path, shape: Shape) -> None:
    is_nested = shape.family.startswith("qwen3")
    files: dict[str, dict[str, Any]] = {
        "config.json": _nested(shape) if is_nested else _flat(shape),
        "generation_config.json": _generation(shape),
    }
    if is_nested:
        files["preprocessor_config.json"] = {
            "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
            **PATCHES_16,
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
        files["video_preprocessor_config.json"] = {
            "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
            **PATCHES_16,
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        }
    else:
        limits = {"min_pixels": 3136, "max_pixels": MAX_PIXELS_14[shape.family]}
        files["preprocessor_config.json"] = {**limits, **PATCHES_14}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2))


def token_ids(shape: Shape) -> dict[str, int]:
    first = first_special_id(shape)
    return {
        "vision_start_token_id": first + 9,
        "vision_end_token_id": first + 10,
        "image_token_id": first + 12,
        "video_token_id": first + 13,
    }


def _flat(shape: Shape) -> dict[str, Any]:
    is_older = shape.family == "qwen2_vl"
    first = first_special_id(shape)
    vision = {
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        **({} if is_older else {"hidden_act": "silu", "tokens_per_second": 2}),
        **shape.vision,
    }
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "attention_dropout": 0.0,
        "bos_token_id": first,
        "eos_token_id": first + 2,
        **token_ids(shape),
        "vision_token_id": first + 11,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32_768 if is_older else 128_000,
        "max_window_layers": shape.text["num_hidden_layers"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": _contiguous_section(shape.head_dim)},
        "sliding_window": 32_768,
        "use_sliding_window": False,
        "tie_word_embeddings": shape.is_tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vision_config": vision,
        "vocab_size": shape.vocab_size,
        **shape.text,
    }


def _nested(shape: Shape) -> dict[str, Any]:
    first, is_hybrid = first_special_id(shape), shape.family.startswith("qwen3_5")
    has_experts = shape.family == "qwen3_vl_moe"
    text = {
        "model_type": f"{shape.family}_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": first,
        # The text of Qwen3.5 knows one end only; the end of a turn is in the settings of generation.
        "eos_token_id": first if is_hybrid else first + 2,
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 262_144,
        "rms_norm_eps": 1e-6,
        **(_partial_rotation(shape.head_dim) if is_hybrid else _rotation(shape.head_dim)),
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        # The published file of the models with experts says it at the top only.
        **({"decoder_sparse_step": 1, "norm_topk_prob": True} if has_experts else {}),
        **({} if has_experts else {"tie_word_embeddings": shape.is_tied}),
        **shape.text,
    }
    vision = {
        "model_type": shape.family,  # so in the published files; it should be the tower's own
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **shape.vision,
    }
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        **token_ids(shape),
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": shape.is_tied,
        "transformers_version": "4.57.0.dev0",
    }


def _rotation(head_dim: int) -> dict[str, Any]:
    rope = {
        "mrope_interleaved": True,
        "mrope_section": _interleaved_section(head_dim),
        "rope_type": "default",
    }
    return {"rope_theta": 5_000_000, "rope_scaling": rope}


def _partial_rotation(head_dim: int) -> dict[str, Any]:
    """And what else Qwen3.5's files have."""
    half = head_dim // 8  # of the quarter of a head that is turned
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [half - half // 3 - (half + 1) // 3, (half + 1) // 3, half // 3],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000,
        "rope_type": "default",
    }
    return {
        "rope_parameters": rope,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
    }


def _generation(shape: Shape) -> dict[str, Any]:
    first = first_special_id(shape)
    return {
        "bos_token_id": first,
        "pad_token_id": first,
        "eos_token_id": [first + 2, first],
        "do_sample": True,
        **SAMPLING[shape.family],
        "transformers_version": "4.41.2",
    }


def _contiguous_section(head_dim: int) -> list[int]:
    """[16, 24, 24] of 64."""
    half = head_dim // 2
    spatial = 3 * half // 8
    return [half - 2 * spatial, spatial, spatial]


def _interleaved_section(head_dim: int) -> list[int]:
    """[24, 20, 20] of 64."""
    half = head_dim // 2
    spatial = 5 * half // 16
    return [half - 2 * spatial, spatial, spatial]
