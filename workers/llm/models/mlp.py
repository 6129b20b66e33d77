"""The gated MLP of a layer: down(silu(gate(x)) · up(x)); each rank has a shard of the columns."""

from __future__ import annotations

from torch import Tensor

from workers.llm.models.stream import ResidualStream
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm, silu_mul
from workers.nn.weights.shard import Shard
from workers.nn.weights.weights import Weights


class Mlp:
    def __init__(self, weights: Weights, shard: Shard, kernels: Kernels | None) -> None:
        self._gate_up = weights.column(("gate_proj", "up_proj"), (shard, shard))
        self._down = weights.row("down_proj", shard)
        self._silu_mul = silu_mul if kernels is None else kernels.silu_mul

    def part(self, x: Tensor) -> Tensor:
        """This rank's part of the output of x; the ranks' parts are summed."""
        return self._down(self._silu_mul(self._gate_up(x)))

    def __call__(self, stream: ResidualStream, norm: RMSNorm) -> None:
        """Adds the MLP's output to the stream."""
        stream.project(self._down, self._silu_mul(self._gate_up(stream.normed(norm))))
