"""What quantised checkpoints stand for: dense ones, by the library of their maker or by formulas of their own
here, number by number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = (
    "weight_packed", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_scale_inv", "weight_scale",
    "input_scale", "qweight", "qzeros", "scales", "g_idx", "weight",
)  # fmt: skip


def dequantise(folder: Path, dense: Path) -> Path:
    """Writes the checkpoint that `folder` stands for into `dense`, in float32."""
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    dense.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix not in (".safetensors", ".json") or (
            file.suffix == ".json" and file.name not in ("hf_quant_config.json", "config.json")
        ):
            (dense / file.name).write_bytes(file.read_bytes())
    (dense / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors"):
        save_file(dense_tensors(load_file(file), settings), dense / file.name, metadata={"format": "pt"})
    return dense


def dense_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in SUFFIXES:
            layers.setdefault(module, {})[last] = tensor
        elif not name.endswith("_scale_inv"):
            scale = tensors.get(f"{name}_scale_inv")
            found[name] = tensor if scale is None else stacked(tensor, scale, settings["weight_block_size"])
    for module, layer in layers.items():
        found[f"{module}.weight"] = (
            layer["weight"] if set(layer) == {"weight"} else matrix(module, layer, settings)
        )
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def matrix(module: str, layer: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    match settings["quant_method"]:
        case "compressed-tensors":
            return of_compressed(module, layer, settings)
        case "awq":
            return of_awq(layer)
        case "gptq" | "auto-round":
            shift = 1 if settings.get("checkpoint_format", "gptq") == "gptq" else 0
            return of_gptq(layer, settings["bits"], shift)
    scale = layer.get("weight_scale_inv", layer.get("weight_scale"))
    assert scale is not None
    return blocks(layer["weight"], scale, settings.get("weight_block_size") or layer["weight"].shape)


def blocks(numbers: Tensor, scale: Tensor, size: Any) -> Tensor:
    wide = numbers.float().clone()
    table = scale.float().reshape(-(-wide.shape[0] // size[0]), -(-wide.shape[1] // size[1]))
    for row in range(table.shape[0]):
        for column in range(table.shape[1]):
            part = slice(row * size[0], (row + 1) * size[0]), slice(column * size[1], (column + 1) * size[1])
            wide[part] *= table[row, column]
    return wide


def stacked(numbers: Tensor, scale: Tensor, size: Any) -> Tensor:
    return torch.stack([blocks(*pair, size) for pair in zip(numbers, scale, strict=True)])


def of_awq(layer: Mapping[str, Tensor]) -> Tensor:
    numbers, zeros = (_in_order(layer[name], 4, AWQ_ORDER) for name in ("qweight", "qzeros"))
    size = len(numbers) // len(zeros)
    wide = (numbers - zeros.repeat_interleave(size, 0)) * layer["scales"].double().repeat_interleave(size, 0)
    return wide.t().float()


def of_gptq(layer: Mapping[str, Tensor], bits: int, shift: int) -> Tensor:
    count = 32 // bits
    numbers = _in_order(layer["qweight"].t(), bits, range(count)).t()
    zeros = (_in_order(layer["qzeros"], bits, range(count)) + shift) % (1 << bits)
    groups = layer["g_idx"].long()
    return ((numbers - zeros[groups]) * layer["scales"].double()[groups]).t().float()


def of_compressed(module: str, layer: dict[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    groups = list(settings["config_groups"].values())
    packed = "weight_packed" in layer
    group = next(
        group for group in groups if len(groups) == 1 or (group["format"] == "pack-quantized") == packed
    )
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    wide = {name: tensor.float() if name == "weight_scale" else tensor for name, tensor in layer.items()}
    found: Tensor = compressor.decompress(wide, QuantizationScheme(**group))["weight"]
    return found.float()


def _in_order(words: Tensor, bits: int, order: Any) -> Tensor:
    """[n, m · 32 / bits] float64, of which each word has those at `order`."""
    count, mask = 32 // bits, (1 << bits) - 1
    wide = words.long() & 0xFFFFFFFF
    out = torch.zeros(len(words), words.shape[1] * count, dtype=torch.float64)
    for place, output in enumerate(order):
        out[:, output::count] = ((wide >> (bits * place)) & mask).double()
    return out
