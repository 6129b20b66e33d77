"""Adapters for tests, and the checkpoints that they make when they are merged: by the formula, in float64."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file

from pipeline.adapters import read_adapter
from pipeline.adapters.tensors import usual_name
from tools.random_checkpoint.lora import write_adapter

SPREAD = 0.1  # of values: then an adapter changes a text from its first tokens on
RANKS = {"first": 4, "second": 8, "third": 2}


def is_of_text(module: str) -> bool:
    return not module.startswith("visual.")


def make_adapters(checkpoint: Path, folder: Path, ranks: Mapping[str, int] = RANKS) -> dict[str, Path]:
    """Of the decoder, by name. The last has queries and values only."""
    last = [*ranks][-1]

    def is_target(module: str) -> bool:
        return is_of_text(module) and module.endswith(("q_proj", "v_proj", "in_proj_z", "in_proj_a"))

    return {
        name: write_adapter(
            checkpoint, folder / name, rank, SPREAD, is_target if name == last else is_of_text
        )
        for name, rank in ranks.items()
    }


def options_of(folders: Mapping[str, Path]) -> tuple[str, ...]:
    return tuple(f"{name}={folder}" for name, folder in folders.items())


def merged(checkpoint: Path, adapter: Path, folder: Path) -> Path:
    """The checkpoint with W + scale · B · A in the place of each W."""
    shutil.copytree(checkpoint, folder)
    path = folder / "model.safetensors"
    tensors, found = load_file(path), read_adapter("", adapter)
    low_rank, names = load_file(found.path), {usual_name(name): name for name in tensors}
    for module, of_module in found.modules.items():
        name = names[f"{module}.weight"]
        delta = of_module.scale * (low_rank[of_module.b].double() @ low_rank[of_module.a].double())
        tensors[name] = (tensors[name].double() + delta).to(tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder
