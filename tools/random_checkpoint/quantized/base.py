"""What a maker's format has to say, for `write.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Settings = dict[str, Any]


class Recipe(ABC):
    """How a maker stores quantised layers."""

    stacks_experts = False  # keeps experts of two tensors so; else they become layers of their own
    has_tower = False  # quantises the tower's layers as well
    method: str  # the `quant_method`

    @abstractmethod
    def layer(self, module: str, weight: Tensor) -> Tensors:
        """The tensors of a layer [out, in], by the names behind the module's."""

    def stacked(self, weight: Tensor) -> Tensors:
        """The tensors of stacked experts, by what is behind the tensor's name."""
        raise NotImplementedError(f"{self.method} stores experts one by one")

    def takes(self, module: str) -> bool:
        """Whether a layer of the kind that is quantised is; makers leave some kinds out."""
        return True

    @abstractmethod
    def settings(self, kept: Sequence[str]) -> Settings:
        """The `quantization_config`. `kept`: layers that are not quantised, as the files name them."""

    def save(self, tensors: Tensors, path: Path) -> None:
        """All tensors of a file."""
        save_file(tensors, path, metadata={"format": "pt"})

    def files(self, kept: Sequence[str]) -> Mapping[str, Any]:
        """Further JSON files."""
        return {}
