"""AutoGPTQ's and GPTQModel's files, and AutoRound's, which are packed alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Settings, Tensors
from tools.random_checkpoint.quantized.groups import quantize_groups, words


class GptqRecipe(Recipe):
    method = "gptq"

    def __init__(
        self,
        group_size: int,
        bits: int = 4,
        version: int = 1,
        is_symmetric: bool = True,
        has_desc_act: bool = False,
        only: str = "",
    ) -> None:
        """`only`: an expression for the layers that are quantised; others are in `dynamic`."""
        self._group_size, self._bits, self._version = group_size, bits, version
        self._is_symmetric, self._has_desc_act, self._only = is_symmetric, has_desc_act, only

    def takes(self, module: str) -> bool:
        return re.search(self._only, module) is not None

    def layer(self, module: str, weight: Tensor) -> Tensors:
        in_features, count = weight.shape[1], 32 // self._bits
        if in_features % count or len(weight) % count:
            raise ValueError(
                f"GPTQ packs {count} numbers in a word, and cannot have {module} of {tuple(weight.shape)}"
            )
        groups = torch.arange(in_features) // self._group_size
        if self._has_desc_act:  # the inputs in the order of their importance, here of chance
            groups = groups[torch.randperm(in_features, generator=torch.Generator().manual_seed(in_features))]
        made = quantize_groups(weight, groups, self._bits, self._is_symmetric)
        zeros = (made.zeros - int(self._version == 1)) & ((1 << self._bits) - 1)
        return {
            "qweight": words(made.numbers.t().reshape(-1, count, len(weight)).mT, self._bits),
            "qzeros": words(zeros.t().reshape(zeros.shape[1], -1, count), self._bits),
            "scales": made.scales.t().contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def settings(self, kept: Sequence[str]) -> Settings:
        left_out: Settings = {"-:.*attn.*": {}, "-:.*visual.*": {}, "-:.*mtp.*": {}}
        return {
            "quant_method": "gptq", "bits": self._bits, "group_size": self._group_size,
            "desc_act": self._has_desc_act, "sym": self._is_symmetric, "lm_head": False,
            "damp_percent": 0.1, "static_groups": False, "true_sequential": True,
            "checkpoint_format": "gptq" if self._version == 1 else "gptq_v2",
            **({"dynamic": left_out} if self._only else {}),
        }  # fmt: skip


class AutoRoundRecipe(GptqRecipe):
    method = "auto-round"

    def settings(self, kept: Sequence[str]) -> Settings:
        return {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": self._bits,
            "group_size": self._group_size, "sym": self._is_symmetric, "data_type": "int", "iters": 200,
            "autoround_version": "0.8.0", "block_name_to_quantize": "model.language_model.layers",
            "extra_config": {name: {"bits": 16, "data_type": "float"} for name in kept},
        }  # fmt: skip
