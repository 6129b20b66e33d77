"""GPTQ: weights in 4 or 8 bits, as AutoGPTQ and GPTQModel pack them.

    qweight  int32 [in · bits / 32, out]              several inputs of one output in a word, in order
    qzeros   int32 [groups, out · bits / 32]          several outputs of one group; of version 1 less 1
    scales   float16 or bfloat16 [groups, out]        weight = (number - zero) · scale
    g_idx    int32 [in]                               the group of each input, which `desc_act` shuffles

The shapes tell the bits, so layers of several settings (`dynamic`) need no names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.weights.exceptions import Names, spellings
from workers.nn.weights.matrices import StoredMatrix, expect_type
from workers.nn.weights.packed import (
    KINDS,
    as_kind,
    put_blocks,
    unpack,
    without_common,
    words_of,
)
from workers.nn.weights.stored import StoredFormat


class GptqMatrix(StoredMatrix):
    def __init__(self, checkpoint: Checkpoint, module: str, is_first_version: bool, group_size: int) -> None:
        """`group_size`: by the settings, where no tensor says the groups; -1: one group."""
        for tensor in ("qweight", "qzeros"):
            expect_type(checkpoint, f"{module}.{tensor}", "I32")
        self._checkpoint, self._module, self._is_first = checkpoint, module, is_first_version
        packed, scales, zeros = (
            checkpoint.shape(f"{module}.{one}") for one in ("qweight", "scales", "qzeros")
        )
        num_groups, out_features = scales
        self._bits = next((bits for bits in KINDS if zeros == (num_groups, out_features * bits // 32)), 0)
        if not self._bits or packed[1] != out_features:
            raise ValueError(
                f"{module} is not packed as GPTQ packs 4 or 8 bits: qweight has the shape {packed}, qzeros "
                f"{zeros}, scales {scales}"
            )
        in_features = packed[0] * 32 // self._bits
        super().__init__(
            f"{module}.qweight", KINDS[self._bits], (out_features, in_features),
            self._find_groups(in_features, num_groups, group_size),
        )  # fmt: skip

    def _find_groups(self, in_features: int, num_groups: int, group_size: int) -> Tensor:
        size = in_features if group_size <= 0 or num_groups == 1 else group_size
        in_order = torch.arange(in_features) // size
        name = f"{self._module}.g_idx"
        # All at 0 means unset.
        if self._checkpoint.has(name) and bool((found := self._checkpoint.read(name).long()).any()):
            in_order = found
        if len(in_order) != in_features or not 0 <= int(in_order.min()) <= int(in_order.max()) < num_groups:
            raise ValueError(
                f"the groups of {self._module} ({name}, else group_size {group_size}) do not fit its "
                f"{in_features} inputs and {num_groups} rows of scales"
            )
        return in_order

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        words, within = words_of(columns, self._bits)
        found = self._checkpoint.read(self.name, words, rows).to(self._checkpoint.device)
        return as_kind(unpack(found.t(), self._bits)[:, within], self._bits)

    def put_blocks(self, rows: slice, columns: slice, order: Tensor | None, out: Tensor) -> bool:
        words, _ = words_of(columns, self._bits)
        put_blocks(self._checkpoint.read(self.name, words, rows).to(self._checkpoint.device).t(), order, out)
        return True

    def scales(self, rows: slice) -> Tensor:
        found = self._checkpoint.read(f"{self._module}.scales", columns=rows)
        return found.to(self._checkpoint.device).float().t()

    def zeros(self, rows: slice) -> Tensor | None:
        words, within = words_of(rows, self._bits)
        found = self._checkpoint.read(f"{self._module}.qzeros", columns=words).to(self._checkpoint.device)
        zeros = unpack(found, self._bits)[:, within].t()
        if self._is_first:
            zeros = (zeros + 1) & ((1 << self._bits) - 1)
        return without_common(as_kind(zeros.contiguous(), self._bits), self.kind)


class Gptq(StoredFormat):
    name: ClassVar[str] = "gptq"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._is_first = (settings.get("checkpoint_format") or "gptq") == "gptq"
        self._group_size = int(settings.get("group_size") or -1)
        self._dynamic: Mapping[str, Mapping[str, Any]] = settings.get("dynamic") or {}
        listed = settings.get("modules_to_not_convert")
        self._exceptions = None if listed is None else Names(listed)
        self._has_head = settings.get("lm_head")

    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        rules = self._rules(module) or {}
        group_size = int(rules.get("group_size") or self._group_size)
        return GptqMatrix(checkpoint, module, self._is_first, group_size)

    def says(self, module: str) -> bool | None:
        """Without a word of it in the settings, layers of the decoder are quantised, and others may be."""
        if module == "lm_head":
            return None if self._has_head is None else bool(self._has_head)
        if self._rules(module) is None or (self._exceptions is not None and self._exceptions.match(module)):
            return False
        return True if module.startswith("model.layers.") else None

    def _rules(self, module: str) -> Mapping[str, Any] | None:
        """What `dynamic` says of a layer, whose first expression that matches counts; None: not quantised."""
        for pattern, rules in self._dynamic.items():
            expression = re.compile(pattern.removeprefix("+:").removeprefix("-:"))
            if any(expression.match(name) for name in spellings(module)):
                return None if pattern.startswith("-:") else rules
        return {}
