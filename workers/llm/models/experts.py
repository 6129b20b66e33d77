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
        self.experts = weights.experts("experts", shard, kernels)

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds the experts' output to the stream."""
        x = stream.normed(norm)
        stream.add_part(self.experts(x, *self.route(x)))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token, and their shares, which add up to 1. Both [num_tokens, k]."""
        probabilities = F.softmax(F.linear(x, self._router), dim=-1, dtype=torch.float32)
        best, chosen = probabilities.topk(self._num_chosen, dim=-1)
        return chosen, (best / best.sum(dim=-1, keepdim=True)).to(x.dtype)
