"""FP8: Qwen's own files, with scales for blocks or for matrices, and those of ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Settings, Tensors

LARGEST = 448.0


def to_blocks(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [out, in] float8_e4m3fn, and scales [⌈out / rows⌉, ⌈in / columns⌉] of a type."""
    height, width = weight.shape
    padded = F.pad(weight.float(), (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scales = (blocks.abs().amax(dim=(1, 3)) / LARGEST).clamp(min=1e-8).to(dtype)
    scaled = (blocks / scales.float()[:, None, :, None]).clamp(-LARGEST, LARGEST)
    numbers = scaled.flatten(2, 3).flatten(0, 1)[:height, :width]
    return numbers.contiguous().to(torch.float8_e4m3fn), scales


class BlockRecipe(Recipe):
    """Of blocks; the experts of a layer stay stacked where the checkpoint has them so."""

    method = "fp8"

    def __init__(self, block: int, scale_dtype: torch.dtype, stacks_experts: bool) -> None:
        self._block, self._dtype, self.stacks_experts = block, scale_dtype, stacks_experts

    def layer(self, module: str, weight: Tensor) -> Tensors:
        numbers, scales = to_blocks(weight, self._block, self._block, self._dtype)
        return {"weight": numbers, "weight_scale_inv": scales}

    def stacked(self, weight: Tensor) -> Tensors:
        made = [to_blocks(one, self._block, self._block, self._dtype) for one in weight]
        # Float8 cannot be stacked.
        numbers = torch.stack([one.view(torch.uint8) for one, _ in made]).view(torch.float8_e4m3fn)
        return {"": numbers, "_scale_inv": torch.stack([scales for _, scales in made])}

    def settings(self, kept: Sequence[str]) -> Settings:
        return {
            "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
            "weight_block_size": [self._block, self._block], "modules_to_not_convert": list(kept),
        }  # fmt: skip


class TensorRecipe(Recipe):
    """One scale for a matrix, and a static one for its inputs."""

    method = "fp8"

    def layer(self, module: str, weight: Tensor) -> Tensors:
        scale = (weight.float().abs().amax() / LARGEST).clamp(min=1e-8)
        numbers = (weight.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return {"weight": numbers, "weight_scale": scale, "input_scale": torch.tensor(0.02)}

    def settings(self, kept: Sequence[str]) -> Settings:
        return {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": list(kept)}


class ModelOptRecipe(TensorRecipe):
    method = "modelopt"

    def settings(self, kept: Sequence[str]) -> Settings:
        return {
            "quant_method": "modelopt", "quant_algo": "FP8", "ignore": _patterns(kept),
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "producer": {"name": "modelopt", "version": "0.37.0"},
        }  # fmt: skip

    def files(self, kept: Sequence[str]) -> Mapping[str, Any]:
        settings = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": _patterns(kept)}
        producer = {"name": "modelopt", "version": "0.37.0"}
        return {"hf_quant_config.json": {"producer": producer, "quantization": settings}}


def _patterns(kept: Sequence[str]) -> list[str]:
    """The tower as a whole; the head for a further token is missing, as in published files."""
    others = [name for name in kept if "visual" not in name and not name.startswith("mtp")]
    return ["model.visual*", "visual*", *others]
