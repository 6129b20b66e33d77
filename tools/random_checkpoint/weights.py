"""Random tensors under the names and in the layouts that the hub has for a family.

Names and shapes are those of transformers' model of the same `config.json`, which is never filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

SHARD_BYTES = 4 << 30
SPREAD = 0.02  # of the weights, as transformers starts a training with
FUSED_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
Shapes = Mapping[str, tuple[int, ...]]


def write_weights(folder: Path, device: torch.device, has_split_experts: bool = False) -> None:
    """For the `config.json` of the folder, in bfloat16, made on `device`.

    The experts of a layer are two tensors, [experts, hidden, 2 · intermediate] and [experts, intermediate,
    hidden], or with `has_split_experts` three matrices each, as in quantised checkpoints.
    """
    shapes = hub_shapes(folder)
    if has_split_experts:
        shapes = _split_experts(shapes)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(shapes, torch.Generator(device).manual_seed(0))):
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
    return {
        name: (shape[0], shape[2], shape[1]) if name.endswith(FUSED_EXPERTS) else shape
        for name, shape in shapes.items()
    }


def _hub_name(name: str, family: str) -> str:
    if family.startswith("qwen3"):
        return name
    return name.replace("model.visual.", "visual.", 1).replace("model.language_model.", "model.", 1)


def _split_experts(shapes: Shapes) -> Shapes:
    split: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith(FUSED_EXPERTS):
            split[name] = shape
            continue
        num_experts, num_inputs, num_outputs = shape
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        for number in range(num_experts):
            for part in parts:
                matrix = f"{name.rpartition('.')[0]}.{number}.{part}.weight"
                split[matrix] = (num_outputs // len(parts), num_inputs)
    return split


def _shards(shapes: Shapes, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        if "norm" in name or "ln_q" in name:
            tensor.fill_(float(name.endswith("weight")))
        else:
            tensor.normal_(0, SPREAD, generator=generator)
        shard[name] = tensor.cpu()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard
