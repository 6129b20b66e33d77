"""AutoAWQ's files (`version` gemm)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tools.random_checkpoint.quantized.base import Recipe, Settings, Tensors
from tools.random_checkpoint.quantized.groups import Grouped, quantize_groups, words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight neighbours, the one that a word has at each place


class AwqRecipe(Recipe):
    method = "awq"

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    def layer(self, module: str, weight: Tensor) -> Tensors:
        if weight.shape[1] % self._group_size or weight.shape[0] % 8:
            raise ValueError(
                f"AWQ with groups of {self._group_size} cannot have {module} of {tuple(weight.shape)}"
            )
        groups = torch.arange(weight.shape[1]) // self._group_size
        made: Grouped = quantize_groups(weight, groups, bits=4, is_symmetric=False)
        return {
            "qweight": _pack(made.numbers.t()), "qzeros": _pack(made.zeros.t()),
            "scales": made.scales.t().contiguous(),
        }  # fmt: skip

    def settings(self, kept: Sequence[str]) -> Settings:
        others = [name for name in kept if "visual" not in name and name != "lm_head"]
        return {
            "quant_method": "awq", "bits": 4, "group_size": self._group_size, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": ["visual", *others],
        }  # fmt: skip


def _pack(numbers: Tensor) -> Tensor:
    """[n, out / 8] int32 of [n, out]."""
    eights = numbers.reshape(len(numbers), -1, 8)[:, :, list(ORDER)]
    return words(eights, 4)
