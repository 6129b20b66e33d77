"""Files of formats that the server refuses, so that its words for them can be tried."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Settings, Tensors

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by code; 8 is added for a minus
GROUP = 16


class Nvfp4Recipe(Recipe):
    """Of ModelOpt: two numbers of 4 bits in a byte, scales in float8, and a scale of these."""

    method = "modelopt"

    def layer(self, module: str, weight: Tensor) -> Tensors:
        parts = weight.float().unflatten(1, (-1, GROUP))
        most = parts.abs().amax(2)
        of_scales = (most.max() / (6 * 448)).clamp(min=1e-8)
        scales = (most / 6 / of_scales).clamp(min=2**-9).to(torch.float8_e4m3fn)
        scaled = parts / (scales.float() * of_scales)[..., None]
        codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        pairs = codes.flatten(1).unflatten(1, (-1, 2))
        return {
            "weight": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8), "weight_scale": scales,
            "weight_scale_2": of_scales, "input_scale": torch.tensor(0.02),
        }  # fmt: skip

    def settings(self, kept: Sequence[str]) -> Settings:
        return {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(kept)}


class GgufRecipe(Recipe):
    """llama.cpp's file in the place of safetensors."""

    method = "gguf"

    def layer(self, module: str, weight: Tensor) -> Tensors:
        return {"weight": weight}

    def settings(self, kept: Sequence[str]) -> Settings:
        return {}

    def save(self, tensors: Tensors, path: Path) -> None:
        from gguf import GGUFWriter

        writer = GGUFWriter(path.with_suffix(".gguf"), "qwen2vl")
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.half().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
