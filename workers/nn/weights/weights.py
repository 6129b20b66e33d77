"""A checkpoint as a model sees it: tensors by name, and linear layers in any format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint, StoredRows
from workers.nn.weights.adapters import AdapterSet
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.dense import load_part, load_side_by_side
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard


class Weights:
    """The tensors under a prefix.

    `formats`: the first that holds a layer reads it; the last one holds every layer. `adapters`: what is
    added to layers, in any format.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Sequence[Format],
        prefix: str = "",
        adapters: AdapterSet | None = None,
    ) -> None:
        self._checkpoint, self._formats, self._prefix = checkpoint, formats, prefix
        self._adapters = adapters

    @property
    def dtype(self) -> torch.dtype:
        return self._checkpoint.dtype

    @property
    def device(self) -> torch.device:
        return self._checkpoint.device

    def under(self, prefix: str) -> Weights:
        """The same checkpoint with a longer prefix: `weights.under("model.layers.3")`."""
        return Weights(self._checkpoint, self._formats, f"{self._prefix}{prefix}.", self._adapters)

    def expect(self, prefix: str) -> None:
        """Progress counts the tensors under this prefix only."""
        self._checkpoint.expect(prefix)

    def has_module(self, module: str) -> bool:
        """Whether the checkpoint has this layer, in whichever format."""
        return self._checkpoint.has_module(self._prefix + module)

    def tensor(self, name: str, rows: Shard = WHOLE) -> Tensor:
        """A tensor that is no linear layer (a norm, an embedding table, a bias), in the model's type."""
        return load_part(self._checkpoint, self._prefix + name, rows)

    def wide_tensor(self, name: str, rows: Shard = WHOLE) -> Tensor:
        """As `tensor`, but in float32, with all digits that the checkpoint has."""
        assert not rows.padding, "nothing pads these"
        parts = [self._checkpoint.read(self._prefix + name, part) for part in rows.slices]
        return torch.cat(parts).to(device=self.device, dtype=torch.float32)

    def rows_in_file(self, name: str) -> StoredRows:
        """A matrix that stays in its file."""
        return self._checkpoint.rows(self._prefix + name)

    def bias(self, modules: Sequence[str], shards: Sequence[Shard]) -> Tensor:
        """The bias for `column` of the same layers."""
        names = [f"{self._prefix}{module}.bias" for module in modules]
        return load_side_by_side(self._checkpoint, names, shards)

    def column(self, modules: Sequence[str], shards: Sequence[Shard], bias: Tensor | None = None) -> Linear:
        """Several layers with one input as one layer. Each rank has the outputs of its shards.

        Raises ValueError where the layers are not all in one format.
        """
        names = [self._prefix + module for module in modules]
        first, *others = (self._format_of(name) for name in names)
        if any(other is not first for other in others):
            raise ValueError(f"{', '.join(names)} are not all in one format, but are computed as one layer")
        return self.adapted(first.column(self._checkpoint, names, shards, bias), modules, shards)

    def row(self, module: str, shard: Shard) -> Linear:
        """A layer without a bias. Each rank has the inputs of its shard; the ranks' results are summed."""
        name = self._prefix + module
        linear = self._format_of(name).row(self._checkpoint, name, shard)
        return linear if self._adapters is None else self._adapters.row(linear, name, shard)

    def adapted(self, linear: Linear, modules: Sequence[str], shards: Sequence[Shard]) -> Linear:
        """A layer of another making, with the adapters of these modules, of each the outputs of its shard."""
        if self._adapters is None:
            return linear
        return self._adapters.column(linear, [self._prefix + module for module in modules], shards)

    def experts(self, module: str, shard: ExpertsShard, kernels: Kernels | None) -> Experts:
        """The experts of a layer, in whichever format and layout the checkpoint has them."""
        name = self._prefix + module
        return self._format_of(name).experts(self._checkpoint, name, shard, kernels)

    def linear(self, module: str) -> Linear:
        """A whole layer with its bias."""
        return self.column((module,), (WHOLE,), self.tensor(f"{module}.bias"))

    def packed(self, module: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """A layer of a weight in memory, such as tied embeddings."""
        return self._format_of(self._prefix + module).pack(weight, bias)

    def unquantized(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """As `packed`, of a layer that stays in the model's type whichever format the others have."""
        return self._formats[-1].pack(weight, bias)

    def close(self) -> None:
        """Closes the files once the model is loaded."""
        self._checkpoint.close()

    def _format_of(self, module: str) -> Format:
        return next(format for format in self._formats if format.holds(module))
