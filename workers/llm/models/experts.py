"""An MLP of experts: a router chooses a few of them for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.models.stream import ResidualStream
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm
from workers.nn.weights.shard import ExpertsShard
from workers.nn.weights.weights import Weights


class ExpertsMlp:
    """The router is whole on every rank and in no format: an error in it would choose another expert."""

    def __init__(
        self, weights: Weights, shard: ExpertsShard, num_chosen: int, kernels: Kernels | None
    ) -> None:
        self._router = weights.tensor("gate.weight")
        self._num_chosen = num_chosen
        self._choose = choose_experts if kernels is None else kernels.choose_experts
        self.experts = weights.experts("experts", shard, kernels)

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds the experts' output to the stream."""
        x = stream.normed(norm)
        stream.add_part(self.experts(x, *self.route(x)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token, and their shares. Both [num_tokens, k]."""
        return self._choose(F.linear(x, self._router), self._num_chosen)


def choose_experts(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As `Kernels.choose_experts`."""
    best, chosen = F.softmax(logits, dim=-1, dtype=torch.float32).topk(num_chosen, dim=-1)
    return chosen, (best / best.sum(dim=-1, keepdim=True)).to(logits.dtype)
