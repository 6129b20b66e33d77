"""A checkpoint as a model sees it: tensors by name, and linear layers in any format."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint, StoredRows
from workers.nn.weights.adapters import AdapterSet
from workers.nn.weights.base import Experts, Format, Linear
from workers.nn.weights.experts import ListedExperts
from workers.nn.weights.parts import load_part, load_side_by_side
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.side_by_side import SideBySide


class Weights:
    """The tensors under a prefix.

    `formats`: the first that holds a layer reads it; the last one holds every layer. `adapters`: what is
    added to layers, in any format. `width`: of what `column` reads and `row` writes, by the model's settings;
    0: the file's own counts.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        formats: Sequence[Format],
        prefix: str = "",
        adapters: AdapterSet | None = None,
        width: int = 0,
    ) -> None:
        self._checkpoint, self._formats, self._prefix = checkpoint, formats, prefix
        self._adapters, self._width = adapters, width

    @property
    def dtype(self) -> torch.dtype:
        return self._checkpoint.dtype

    @property
    def device(self) -> torch.device:
        return self._checkpoint.device

    def under(self, prefix: str) -> Weights:
        """The same checkpoint with a longer prefix: `weights.under("model.layers.3")`."""
        longer = f"{self._prefix}{prefix}."
        return Weights(self._checkpoint, self._formats, longer, self._adapters, self._width)

    def of_width(self, width: int) -> Weights:
        """The same, of a model whose layers have so many inputs, or outputs for `row`. Others are refused."""
        return Weights(self._checkpoint, self._formats, self._prefix, self._adapters, width)

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
        self._checkpoint.check_plain(self._prefix + name)
        parts = [self._checkpoint.read(self._prefix + name, part) for part in rows.slices]
        return torch.cat(parts).to(device=self.device, dtype=torch.float32)

    def matrix(self, module: str, rows: Shard = WHOLE) -> Tensor:
        """The weight of a layer that is computed in no format, in the model's type: dequantised if it is
        stored in one."""
        name = self._prefix + module
        return self._find(name).dense(self._checkpoint, name, rows)

    def is_quantized(self, module: str) -> bool:
        return self._find(self._prefix + module) is not self._formats[-1]

    def rows_in_file(self, name: str) -> StoredRows:
        """A matrix that stays in its file."""
        return self._checkpoint.rows(self._prefix + name)

    def bias(self, modules: Sequence[str], shards: Sequence[Shard]) -> Tensor:
        """The bias for `column` of the same layers."""
        names = [f"{self._prefix}{module}.bias" for module in modules]
        return load_side_by_side(self._checkpoint, names, shards)

    def column(self, modules: Sequence[str], shards: Sequence[Shard], bias: Tensor | None = None) -> Linear:
        """Several layers with one input as one layer. Each rank has the outputs of its shards."""
        pairs = [(self._prefix + module, shard) for module, shard in zip(modules, shards, strict=True)]
        runs = [
            (format, list(run)) for format, run in groupby(pairs, key=lambda pair: self._format_of(pair[0]))
        ]
        if len(runs) == 1:
            found = _column(self._checkpoint, *runs[0], bias)
        else:  # stored in several formats, they are computed one by one
            found = SideBySide([_column(self._checkpoint, format, run, None) for format, run in runs], bias)
        self._check_width(found.in_features, f"the inputs of {pairs[0][0]!r}")
        if bias is not None and len(bias) != found.out_features:
            names = " and ".join(name for name, _ in pairs)
            raise ValueError(f"{names} have {found.out_features} outputs, but a bias of {len(bias)} numbers")
        return self.adapted(found, modules, shards)

    def row(self, module: str, shard: Shard) -> Linear:
        """A layer without a bias. Each rank has the inputs of its shard; the ranks' results are summed."""
        name = self._prefix + module
        linear = self._format_of(name).row(self._checkpoint, name, shard)
        self._check_width(linear.out_features, f"the outputs of {name!r}")
        return linear if self._adapters is None else self._adapters.row(linear, name, shard)

    def _check_width(self, found: int, what: str) -> None:
        if self._width and found != self._width:
            raise ValueError(f"{what} are {found} in the checkpoint's file, by its config.json {self._width}")

    def adapted(self, linear: Linear, modules: Sequence[str], shards: Sequence[Shard]) -> Linear:
        """A layer of another making, with the adapters of these modules, of each the outputs of its shard."""
        if self._adapters is None:
            return linear
        return self._adapters.column(linear, [self._prefix + module for module in modules], shards)

    def experts(self, module: str, shard: ExpertsShard, kernels: Kernels | None) -> Experts:
        """The experts of a layer, in whichever format and layout the checkpoint has them."""
        name = self._prefix + module
        is_fused = self._checkpoint.has(f"{name}.gate_up_proj")
        of_expert = [f"{name}.{{}}.{part}_proj" for part in ("gate", "up", "down")]
        parts = (
            [f"{name}.gate_up_proj", f"{name}.down_proj"]
            if is_fused
            else [part.format(number) for number in shard.held for part in of_expert]
        )
        format, *others = {id(found): found for found in map(self._format_of, parts)}.values()
        if not others:
            return format.experts(self._checkpoint, name, shard, kernels)
        if is_fused:
            raise ValueError(f"{' and '.join(parts)} are not in one format, but are computed together")
        layers = []
        for number in shard.held:
            gate, up, down = (part.format(number).removeprefix(self._prefix) for part in of_expert)
            gate_up = self.column((gate, up), (shard.intermediate, shard.intermediate))
            layers.append((gate_up, self.row(down, shard.intermediate)))
        return ListedExperts(layers, shard.held.start)

    def linear(self, module: str) -> Linear:
        """A whole layer with its bias."""
        return self.column((module,), (WHOLE,), self.tensor(f"{module}.bias"))

    def tied(self, module: str, name: str, rows: Shard) -> Linear:
        """A layer whose weight is a dense tensor of another name."""
        return self._format_of(self._prefix + module).tied(self._checkpoint, self._prefix + name, rows)

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
        """As `_find`, of a layer that may be quantised; a difference from the settings is said."""
        found = self._find(module)
        for format in self._formats[:-1]:
            if self._checkpoint.has(f"{module}.weight") or format is found:
                format.compare(module, format is found)
        return found

    def _find(self, module: str) -> Format:
        *formats, last = self._formats
        return next((format for format in formats if format.holds(self._checkpoint, module)), last)


def _column(
    checkpoint: Checkpoint, format: Format, pairs: Sequence[tuple[str, Shard]], bias: Tensor | None
) -> Linear:
    return format.column(checkpoint, [name for name, _ in pairs], [shard for _, shard in pairs], bias)
