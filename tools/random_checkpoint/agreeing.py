"""Random weights whose head for the next token but one (`mtp.*`) is mostly right, without training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RESIDUAL = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "experts.down_proj")
EMBEDDING, NORM = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight"


def make_agree(folder: Path, share: float) -> Path:
    """Makes the next token depend on the current one's embedding, and for a `share` of the usual on the rest
    of the text; and lets the head see the embedding alone. So both mostly predict the same."""
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= load_file(file)
    size, dtype = len(found["mtp.norm.weight"]), found["mtp.norm.weight"].dtype
    changed = {
        EMBEDDING: found[EMBEDDING] * 10,  # beside what the layers add
        "mtp.norm.weight": found[NORM].clone(),
        "mtp.pre_fc_norm_embedding.weight": torch.zeros(size, dtype=dtype),
        "mtp.fc.weight": torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1).to(dtype),
    }
    for name, tensor in found.items():
        if name.endswith(RESIDUAL) and "visual" not in name:
            changed[name] = tensor * share
    for file in files:
        tensors = load_file(file)
        tensors |= {name: changed[name].contiguous() for name in tensors.keys() & changed.keys()}
        part = file.with_suffix(".part")  # `file` is mapped
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(file)
    return folder
