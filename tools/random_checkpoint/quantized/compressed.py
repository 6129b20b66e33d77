"""llm-compressor's files, by the library of its format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Settings, Tensors


class Group(NamedTuple):
    """Layers with the same settings. `weights`, `inputs`: as `QuantizationArgs` takes them."""

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    targets: tuple[str, ...] = ("Linear",)


class CompressedRecipe(Recipe):
    """The first group whose targets match a layer counts."""

    method = "compressed-tensors"

    def __init__(self, *groups: Group, has_tower: bool = False) -> None:
        self._groups, self.has_tower = groups, has_tower

    def layer(self, module: str, weight: Tensor) -> Tensors:
        from compressed_tensors.compressors.base import BaseCompressor

        group = next(group for group in self._groups if _match(group, module))
        scheme = _scheme(group)
        size = group.weights.get("group_size", 1)
        if weight.shape[1] % size:
            raise ValueError(f"groups of {size} do not divide the inputs of {module}: {tuple(weight.shape)}")
        scale, zero = _parameters(weight.float(), scheme.weights)
        tensors = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
        compressor = BaseCompressor.get_value_from_registry(group.format)
        found: Tensors = compressor.compress(tensors, scheme)
        dtypes = {"weight_scale": torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32}
        return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in found.items()}

    def settings(self, kept: Sequence[str]) -> Settings:
        from compressed_tensors.quantization import QuantizationConfig

        schemes = {f"group_{number}": _scheme(group) for number, group in enumerate(self._groups)}
        formats = {group.format for group in self._groups}
        others = [name for name in kept if "visual" not in name]
        left_out = [] if self.has_tower else ["re:.*visual.*"]
        made = QuantizationConfig(
            config_groups=schemes,
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            quantization_status="compressed",
            ignore=[*others, *left_out, "re:.*mtp.*"],
        )
        found: Settings = made.model_dump(mode="json")
        return found


def _match(group: Group, module: str) -> bool:
    expressions = [target.removeprefix("re:") for target in group.targets if target.startswith("re:")]
    return "Linear" in group.targets or any(re.match(expression, module) for expression in expressions)


def _scheme(group: Group) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    return QuantizationScheme(
        targets=list(group.targets),
        weights=QuantizationArgs(**group.weights),
        input_activations=None if group.inputs is None else QuantizationArgs(**group.inputs),
        format=group.format,
    )


def _parameters(weight: Tensor, arguments: Any) -> tuple[Tensor, Tensor]:
    """Scales and zeros by the smallest and largest of what has one scale: [out, groups] or [1]."""
    from compressed_tensors.quantization.utils import calculate_qparams

    if arguments.strategy == "tensor":
        least, most = weight.amin().reshape(1), weight.amax().reshape(1)
    elif arguments.strategy == "block":
        rows, columns = arguments.block_structure
        height, width = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -width % columns, 0, -height % rows))
        blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        least, most = blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))
    else:
        size = weight.shape[1] if arguments.strategy == "channel" else arguments.group_size
        parts = weight.unflatten(1, (-1, size))
        least, most = parts.amin(2), parts.amax(2)
    scale, zero = calculate_qparams(least, most, arguments)
    return scale, zero
