"""The contract between a model, which names its layers, and a format, which reads and computes them.

    weights = Weights(checkpoint, formats)                                        (weights.py)
    weights.column(("q_proj", "k_proj", "v_proj"), shards) → Linear
    weights.row("o_proj", shard) → Linear
    weights.experts("experts", shard, kernels) → Experts

A format is one file of this package. It reads its own tensors, shards them for tensor parallelism, and knows
which layers of a checkpoint are stored in it and on which devices it computes. `registry.py` chooses the
format by the checkpoint's `quantization_config`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.weights.shard import ExpertsShard, Shard


class Activations(StrEnum):
    """What weights of `grouped.py` are multiplied by: the option `--activation-quantization`."""

    AUTO = "auto"  # on a CPU in 8 bits, where the model computes in bfloat16 and weights are whole numbers
    INT8 = "int8"  # in 8 bits, each row with a scale of its own
    NONE = "none"  # in the model's type


class Linear(ABC):
    """y = x Wᵀ + b, with W [out, in] in its format."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.out_features, self.in_features = out_features, in_features

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """[num_rows, out_features] in the model's type, of x [num_rows, in_features]."""

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), fused where that is possible."""
        return residual + self(x)


class Experts(ABC):
    """Gated MLPs, of which each token takes a few: Σ share · down(silu(gate(x)) · up(x))."""

    @abstractmethod
    def __call__(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """[num_tokens, hidden] of x [num_tokens, hidden], as far as this rank has it: the ranks' results are
        summed.

        chosen: [num_tokens, k] int64, distinct experts for each token. shares: [num_tokens, k], in the
        model's type.
        """


class Format(ABC):
    """Reads linear layers, and makes the `Linear` that computes them.

    Modules are named in full, without `.weight`: `model.layers.0.self_attn.q_proj`.
    """

    name: ClassVar[str]

    @abstractmethod
    def check_device(self, device: torch.device) -> None:
        """Raises ValueError for a device on which the format does not compute."""

    def choose_activations(self, activations: Activations) -> None:
        """For the layers to come. Raises ValueError where there is no choice: only weights of `grouped.py`
        have one."""
        if activations is not Activations.AUTO:
            raise ValueError(
                f"activation_quantization {str(activations)!r} is for checkpoints whose weights are "
                f"quantised, not for {self.name!r}"
            )

    @abstractmethod
    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        """Whether this layer, or the tensor of this name that stacks experts, is stored in the format: by
        the checkpoint's tensors. Every checkpoint has layers that are not."""

    def compare(self, module: str, is_held: bool) -> None:  # noqa: B027
        """Logs it where that is not what the checkpoint's settings say; without settings there is nothing to
        compare."""

    @abstractmethod
    def column(
        self,
        checkpoint: Checkpoint,
        modules: Sequence[str],
        shards: Sequence[Shard],
        bias: Tensor | None,
    ) -> Linear:
        """Several layers as one, with the outputs of each layer's shard concatenated, as `bias` is."""

    @abstractmethod
    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        """The part of a layer for the inputs of the shard; the ranks' results are summed."""

    @abstractmethod
    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        """The experts of one layer. `kernels`: those of the decoder."""

    @abstractmethod
    def dense(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Tensor:
        """The weight [out, in] of some outputs of a layer, in the model's type: for what is computed in no
        format."""

    @abstractmethod
    def tied(self, checkpoint: Checkpoint, name: str, shard: Shard) -> Linear:
        """A layer whose weight is another one's dense tensor, such as tied embeddings: some of its rows."""

    @abstractmethod
    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """A layer of a weight [out, in] in memory, in the model's type."""
