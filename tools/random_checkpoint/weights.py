"""Random tensors under the names and in the layouts that the hub has for a family.

Names and shapes are those of transformers' model of the same `config.json`, which is never filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

SHARD_BYTES = 4 << 30
SPREAD = 0.02  # of the weights, as transformers starts a training with
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
HYBRID = ("qwen3_5", "qwen3_5_moe")
Shapes = Mapping[str, tuple[int, ...]]


def write_weights(folder: Path, device: torch.device, has_split_experts: bool = False) -> None:
    """For the `config.json` of the folder, in bfloat16, made on `device`.

    The experts of a layer are two tensors, as the hub has them: for Qwen3-VL [experts, hidden, 2 ·
    intermediate] and [experts, intermediate, hidden], for Qwen3.5 each of them the other way round. With
    `has_split_experts` they are three matrices each, as in quantised checkpoints.
    """
    family, shapes = _family(folder), hub_shapes(folder)
    if has_split_experts:
        shapes = _split_experts(shapes, family)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes, family, torch.Generator(device).manual_seed(0))):
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
    size = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def hub_shapes(folder: Path) -> Shapes:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        tensors = AutoModelForImageTextToText.from_config(config).state_dict()
    shapes = {_hub_name(name, config.model_type): tuple(tensor.shape) for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    if config.model_type in HYBRID:
        return {**shapes, **_mtp_shapes(shapes, config.text_config)}
    return {
        name: (shape[0], shape[2], shape[1]) if name.endswith(FUSED_EXPERTS) else shape
        for name, shape in shapes.items()
    }


def _family(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def _mtp_shapes(shapes: Shapes, text: Any) -> Shapes:
    """Of the head that predicts a further token: one layer that attends to all tokens."""
    if "full_attention" not in text.layer_types:  # a shape with few layers
        return {}
    layer = f"model.language_model.layers.{text.layer_types.index('full_attention')}."
    size = text.hidden_size
    of_layer = {
        name.replace(layer, "mtp.layers.0.", 1): shape
        for name, shape in shapes.items()
        if name.startswith(layer)
    }
    norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    of_norms: Shapes = {f"mtp.{name}.weight": (size,) for name in norms}
    return {"mtp.fc.weight": (size, 2 * size), **of_norms, **of_layer}


def _hub_name(name: str, family: str) -> str:
    if family.startswith("qwen3"):
        return name
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def _is_zero_centred(name: str) -> bool:
    """In Qwen3.5 one is added to the weight of this norm."""
    return "visual" not in name and "linear_attn" not in name


def _split_experts(shapes: Shapes, family: str) -> Shapes:
    split: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith(FUSED_EXPERTS):
            split[name] = shape
            continue
        num_experts, num_inputs, num_outputs = shape
        if family in HYBRID:
            num_outputs, num_inputs = num_inputs, num_outputs
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        for number in range(num_experts):
            for part in parts:
                matrix = f"{name.rpartition('.')[0]}.{number}.{part}.weight"
                split[matrix] = (num_outputs // len(parts), num_inputs)
    return split


def _shards(shapes: Shapes, family: str, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        if "norm" in name or "ln_q" in name:
            tensor.fill_(float(name.endswith("weight") and not (family in HYBRID and _is_zero_centred(name))))
        else:
            tensor.normal_(0, SPREAD, generator=generator)
        shard[name] = tensor.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
