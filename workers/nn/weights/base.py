"""The contract between a model, which says what it needs, and a format of weights, which says how it comes.

    weights = Weights(checkpoint, formats)                                                   (weights.py)
    weights.column(("q_proj", "k_proj", "v_proj"), shards) → Linear        weights.row("o_proj", shard) →
    Linear

A format is one file of this package. It reads its own tensors, knows how they are cut for tensor
parallelism, which layers of a checkpoint are not stored in it, and on which devices it computes. A
checkpoint's `quantization_config` says which format it is (registry.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.weights.shard import Shard


class Linear(ABC):
    """y = x Wᵀ + b, with W [out, in] as its format keeps it."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features] in the model's type, of x [num_rows, in_features]."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), in one operation where there is one."""
        return residual + self(x)


class Format(ABC):
    """How the weights of linear layers are stored, and what computes with them.

    Modules are named in full, without the `.weight` behind: `model.layers.0.self_attn.q_proj`.
    """

    name: ClassVar[str]

    @abstractmethod
    def check_device(self, device: torch.device) -> None:
        """Raises ValueError for a device on which the format does not compute."""

    @abstractmethod
    def holds(self, module: str) -> bool:
        """Whether this layer is in the format. Every checkpoint has some that are not."""

    @abstractmethod
    def column(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[str],
        shards: Sequence[Shard],
        bias: Tensor | None,
    ) -> Linear:
        """The outputs of several layers side by side, of each those of its shard.

        `bias` is as long as all of them together.
        """

    @abstractmethod
    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        """The part of a layer that takes the inputs of the shard; the ranks' results add up."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A layer of a weight [out, in] that the model has at hand, in the model's type."""
