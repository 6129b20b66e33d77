"""Layers with one input that are computed as one elsewhere, but whose formats or layouts differ here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.nn.weights.base import Linear


class SideBySide(Linear):
    def __init__(self, parts: Sequence[Linear], bias: Tensor | None = None) -> None:
        """`bias`: of all outputs, which the parts do not add. Raises ValueError for parts that have other
        numbers of inputs than the first."""
        if len(counts := {part.in_features for part in parts}) > 1:
            found = " and ".join(map(str, sorted(counts)))
            raise ValueError(f"layers with one input have {found} inputs in the checkpoint's files")
        super().__init__(sum(part.out_features for part in parts), parts[0].in_features)
        self.parts, self._bias = parts, bias

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.cat([part(x) for part in self.parts], dim=-1)
        return out if self._bias is None else out.add_(self._bias)
