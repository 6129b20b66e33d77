"""A random LoRA adapter of a checkpoint, in the files that PEFT writes."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.adapters.files import PREFIX, WEIGHTS, A, B
from pipeline.adapters.settings import SETTINGS
from pipeline.adapters.tensors import PREFIXES, tensors_in

# Of which PEFT makes no linear layers.
OTHERS = ("embed_tokens", "lm_head", "pos_embed", "conv1d", "mlp.gate", "norm", "proj_in")


def linear_layers(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """The linear layers of a checkpoint, as `all-linear` means them, by usual name: outputs and inputs."""
    return {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in tensors_in(folder).items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and _is_linear(name.removesuffix(".weight"))
    }


def _is_linear(module: str) -> bool:
    return not module.endswith(OTHERS) and ".experts." not in module and not module.startswith("mtp.")


def write_adapter(
    checkpoint: Path,
    folder: Path,
    rank: int = 16,
    spread: float = 0.02,
    is_target: Callable[[str], bool] = lambda module: True,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> Path:
    """An adapter in `folder` of those linear layers of a checkpoint for which `is_target` holds.

    `settings`: of `adapter_config.json`, in place of the usual ones. `spread`: of both matrices' values.
    """
    found = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "lora_dropout": 0.0, "bias": "none", "target_modules": "all-linear", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "base_model_name_or_path": checkpoint.name,
        "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, **settings,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in linear_layers(checkpoint).items():
        if not is_target(module):
            continue
        for kind, shape in ((A, (rank, in_features)), (B, (out_features, rank))):
            made = torch.randn(shape, generator=generator) * spread
            tensors[f"{PREFIX}{_newer_name(module)}{kind}"] = made.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / SETTINGS).write_text(json.dumps(found, indent=2))
    return folder


def _newer_name(module: str) -> str:
    """As transformers 5 has it."""
    for newer, older in PREFIXES:
        if module.startswith(older):
            return newer + module.removeprefix(older)
    return module
