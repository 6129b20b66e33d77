"""A toy in a folder: random weights, the embedded model's tokenizer and chat template, and the entry point
that makes its family known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from launcher.checkpoints import EMBEDDED
from pipeline.families.registry import GROUP

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
LANGUAGE = {
    "width": 48,
    "depth": 3,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mlp_width": 96,
    "vocab_size": 4096,
    "context": 1024,
}
EYE = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "mlp_width": 64,
    "embedding_width": 2 * LANGUAGE["width"],
    "patch": 10,
    "merge": 3,
    "min_pixels": 30 * 30,
    "max_pixels": 180 * 180,
}
TOKENS = {"picture_token_id": 4094, "video_token_id": 4095, "eos_token_id": 4084}


def make_toy(folder: Path, has_memory: bool, seed: int = 0) -> Path:
    """Returns the folder of the checkpoint."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "toy_vl",
        "language": {**LANGUAGE, "has_memory": has_memory},
        "eye": EYE,
        **TOKENS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    generator = torch.Generator().manual_seed(seed)
    shapes = {**_eye_shapes(), **_language_shapes(has_memory)}
    tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def install_toy(folder: Path) -> Path:
    """As pip would leave the toy's package behind: a folder for PYTHONPATH."""
    info = folder / "toy_family-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\ntoy_vl = tests.toy_family.family:ToyFamily\n")
    return folder


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Large enough that greedy text is lively, and depends on the pictures."""
    if "norm" in name:
        return torch.rand(shape, generator=generator) + 0.5
    if name.endswith("decay.weight"):
        return torch.rand(shape, generator=generator) * 0.3 + 0.65
    scale = {1: 0.1, 2: 1.5 * shape[-1] ** -0.5}[len(shape)]
    if name in ("mind.words.weight", "eye.place.weight"):
        scale = 1.0
    return torch.randn(shape, generator=generator) * scale


def _linear(name: str, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (num_out, num_in), f"{name}.bias": (num_out,)}


def _eye_shapes() -> dict[str, tuple[int, ...]]:
    width, hidden = EYE["width"], EYE["mlp_width"]
    shapes = {
        **_linear("eye.look", width, 3 * EYE["patch"] ** 2),
        "eye.place.weight": (2, width),
        "eye.norm.weight": (width,),
        **_linear("eye.out", EYE["embedding_width"], EYE["merge"] ** 2 * width),
    }
    for number in range(EYE["depth"]):
        block = f"eye.blocks.{number}"
        shapes |= {f"{block}.norm1.weight": (width,), f"{block}.norm2.weight": (width,)}
        shapes |= _linear(f"{block}.qkv", 3 * width, width) | _linear(f"{block}.proj", width, width)
        shapes |= _linear(f"{block}.up", hidden, width) | _linear(f"{block}.down", width, hidden)
    return shapes


def _language_shapes(has_memory: bool) -> dict[str, tuple[int, ...]]:
    width, dim, hidden = LANGUAGE["width"], LANGUAGE["head_dim"], LANGUAGE["mlp_width"]
    query, kv = LANGUAGE["heads"] * dim, LANGUAGE["kv_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "mind.words.weight": (LANGUAGE["vocab_size"], width),
        "mind.norm.weight": (width,),
        "mind.mouth.weight": (LANGUAGE["vocab_size"], width),
    }
    for number in range(LANGUAGE["depth"]):
        of_layer = {
            "norm1": (width,),
            "norm2": (width,),
            "q_norm": (dim,),
            "k_norm": (dim,),
            "q_proj": (query, width),
            "k_proj": (kv, width),
            "v_proj": (kv, width),
            "o_proj": (width, query),
            "mlp.gate_proj": (hidden, width),
            "mlp.up_proj": (hidden, width),
            "mlp.down_proj": (width, hidden),
        }
        shapes |= {f"mind.layers.{number}.{name}.weight": shape for name, shape in of_layer.items()}
    if has_memory:
        of_memory = {"norm": (width,), "decay": (width,)}
        of_memory |= dict.fromkeys(("write", "gate", "read"), (width, width))
        shapes |= {f"mind.memory.{name}.weight": shape for name, shape in of_memory.items()}
    return shapes
