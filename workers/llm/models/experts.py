"""An MLP of experts: a router chooses a few of them for each token; beside them there may be one for all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.models.mlp import Mlp
from workers.llm.models.stream import ResidualStream
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm
from workers.nn.weights.base import Linear
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.weights import Weights


class ExpertsMlp:
    """The router is whole on every rank and in no format: an error in it would choose another expert."""

    def __init__(
        self, weights: Weights, shard: ExpertsShard, num_chosen: int, kernels: Kernels | None
    ) -> None:
        self._router = _exact(weights, "gate")
        self._num_chosen = num_chosen
        self._choose = choose_experts if kernels is None else kernels.choose_experts
        self.experts = weights.experts("experts", shard, kernels)

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds the experts' output to the stream."""
        stream.add_part(self.part(stream.normed(norm)))

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the output of x; the ranks' parts are summed."""
        return self.experts(x, *self.route(x))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each token, and their shares. Both [num_tokens, k]."""
        return self._choose(self._router(x), self._num_chosen)


class SharedExpertMlp:
    """Beside the experts that a token chooses, one that all tokens share, times the sigmoid of a gate."""

    def __init__(
        self,
        weights: Weights,
        shard: ExpertsShard,
        num_chosen: int,
        of_shared: Shard,
        kernels: Kernels | None,
    ) -> None:
        """`of_shared`: the part of the shared expert's intermediate size."""
        self._chosen = ExpertsMlp(weights, shard, num_chosen, kernels)
        self._shared = Mlp(weights.under("shared_expert"), of_shared, kernels)
        self._gate = _exact(weights, "shared_expert_gate")  # of one output, whole as the router

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds the experts' output to the stream."""
        x = stream.normed(norm)
        shared = self._shared.part(x) * self._gate(x).sigmoid_()
        stream.add_part(self._chosen.part(x).add_(shared))


def _exact(weights: Weights, module: str) -> Linear:
    """A layer in no format."""
    return weights.adapted(TorchLinear(weights.matrix(module)), (module,), (WHOLE,))


def choose_experts(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As `Kernels.choose_experts`."""
    best, chosen = F.softmax(logits, dim=-1, dtype=torch.float32).topk(num_chosen, dim=-1)
    return chosen, (best / best.sum(dim=-1, keepdim=True)).to(logits.dtype)
