"""The residual stream, which layers read (normed) and add to.

A layer is written once. The stream fuses its additions with the projection before them (on a CPU) or with the
norm behind them (on a GPU).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from workers.llm.parallel import TensorParallel
from workers.nn.fused import Kernels
from workers.nn.layers import RMSNorm
from workers.nn.weights.base import Linear


class ResidualStream(ABC):
    @abstractmethod
    def normed(self, norm: RMSNorm) -> Tensor:
        """The stream [num_tokens, hidden], normed."""

    @abstractmethod
    def project(self, linear: Linear, part: Tensor) -> None:
        """Adds linear(part), summed over ranks: `part` is this rank's shard of the inputs."""

    @abstractmethod
    def add_part(self, part: Tensor) -> None:
        """Adds the sum over ranks of this rank's part [num_tokens, hidden], which may be overwritten."""

    @abstractmethod
    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        """Adds values [n, hidden], the same on all ranks, to the tokens `rows` [n]."""


class PlainStream(ResidualStream):
    """With torch's operators."""

    def __init__(self, x: Tensor, parallel: TensorParallel) -> None:
        self._x, self._parallel = x, parallel

    def normed(self, norm: RMSNorm) -> Tensor:
        return norm(self._x)

    def project(self, linear: Linear, part: Tensor) -> None:
        if self._parallel.size == 1:
            self._x = linear.add_to(self._x, part)
        else:
            self.add_part(linear(part))

    def add_part(self, part: Tensor) -> None:
        self._x = self._x + self._parallel.all_reduce(part)

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        self._x = self._x.index_add(0, rows, values)


class FusedStream(ResidualStream):
    """With kernels that add the pending sum in the norm. Overwrites x."""

    def __init__(self, x: Tensor, parallel: TensorParallel, kernels: Kernels) -> None:
        self._x, self._parallel, self._kernels = x, parallel, kernels
        self._pending: Tensor | None = None

    def normed(self, norm: RMSNorm) -> Tensor:
        normed = self._kernels.add_rms_norm(self._x, self._pending, norm.weight, norm.eps)
        self._pending = None
        return normed

    def project(self, linear: Linear, part: Tensor) -> None:
        self.add_part(linear(part))

    def add_part(self, part: Tensor) -> None:
        assert self._pending is None, "a norm stands between two sums"
        self._pending = self._parallel.all_reduce(part)

    def add_rows(self, rows: Tensor, values: Tensor) -> None:
        # A pending sum stays pending: the next norm adds it all the same.
        self._x.index_add_(0, rows, values)


def make_stream(x: Tensor, parallel: TensorParallel, kernels: Kernels | None) -> ResidualStream:
    return PlainStream(x, parallel) if kernels is None else FusedStream(x, parallel, kernels)
