"""Walks over the tensors of a dense checkpoint, file by file, and writes the quantised one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Tensors
from tools.random_checkpoint.quantized.layers import OTHERS, PROJECTIONS, STACKED, TOWER
from tools.random_checkpoint.quantized.recipes import RECIPES

TRANSPOSED = ("qwen3_vl_moe",)  # families whose stacked experts are [experts, in, out]
INDEX = "model.safetensors.index.json"


def quantize_checkpoint(dense: Path, folder: Path, format: str, group_size: int = 128) -> Path:
    """The checkpoint `dense` in one of the formats of `RECIPES`, in `folder`, which is made.

    `group_size`: inputs, or rows and columns of a block, that have one scale. Raises ValueError for
    sizes that the format cannot pack.
    """
    recipe, config = RECIPES[format](group_size), json.loads((dense / "config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    for file in dense.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copy(file, folder / file.name)
    places: dict[str, str] = {}
    kept: list[str] = []
    size = 0
    for file in sorted(dense.glob("*.safetensors")):
        tensors = dict(_converted(file, recipe, config["model_type"], kept))
        recipe.save(tensors, folder / file.name)
        places |= dict.fromkeys(tensors, file.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if (dense / INDEX).is_file():
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    settings = recipe.settings(kept)
    if settings:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in recipe.files(kept).items():
        (folder / name).write_text(json.dumps(content, indent=2))
    return folder


def _converted(path: Path, recipe: Recipe, family: str, kept: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file; the names of layers that stay dense are added to `kept`."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor: Tensor = file.get_tensor(name)
            if STACKED.match(name):
                found = _experts(name, tensor, recipe, family in TRANSPOSED)
                kept += [key.removesuffix(".weight") for key, part in found.items() if _is_kept(key, part)]
                yield from found.items()
                continue
            module = name.removesuffix(".weight")
            is_layer = name != module and tensor.ndim == 2
            is_of_tower = TOWER.match(module) is not None
            is_chosen = recipe.has_tower if is_of_tower else PROJECTIONS.match(module)
            if is_layer and is_chosen and recipe.takes(module):
                for part, made in recipe.layer(module, tensor).items():
                    yield f"{module}.{part}", made.contiguous()
                continue
            if is_layer and (is_of_tower or PROJECTIONS.match(module) or OTHERS.match(module)):
                kept.append(module)
            yield name, tensor


def _is_kept(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.dtype.itemsize > 1


def _experts(name: str, stacked: Tensor, recipe: Recipe, is_transposed: bool) -> Tensors:
    """Of all experts of a layer, which the recipe may store one by one."""
    if recipe.stacks_experts:
        return {name + part: made.contiguous() for part, made in recipe.stacked(stacked).items()}
    module, _, projection = name.rpartition(".")
    made: Tensors = {}
    for number, matrix in enumerate(stacked.mT if is_transposed else stacked):
        names = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        for part, weight in zip(names, matrix.chunk(len(names)), strict=True):
            layer = f"{module}.{number}.{part}"
            found = recipe.layer(layer, weight) if recipe.takes(layer) else {"weight": weight}
            made |= {f"{layer}.{key}": tensor.contiguous() for key, tensor in found.items()}
    return made
