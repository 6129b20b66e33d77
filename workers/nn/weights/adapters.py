"""LoRA adapters beside linear layers of any format: y = base(x) + scale · B · A · x, with other adapters, or
none, for the rows of other requests.

    adapters = AdapterSet(read_adapters(options), is_mine, dtype, device)
    weights = open_weights(…, adapters=adapters)      → layers are built, those that have adapters as such
    adapters.check_all_loaded()
    with adapters.of_rows(numbers): …                 → a step

The base's product is one for all rows. What is added to it depends on how many rows a step has. Few rows, of
several adapters: one product with the first matrices of all adapters side by side, zeros where a row has
another adapter, and one with all second matrices, or, of many columns, one for each layer computed as a part
of this one. Many rows: two products for each adapter, of its rows.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from pipeline.adapters import Adapter
from workers.nn.loader import to_device
from workers.nn.weights.base import Linear
from workers.nn.weights.shard import WHOLE, Shard

NO_ADAPTER = -1
FEW_ROWS = 32  # up to which the matrices of other adapters cost less than more products do
FEW_COLUMNS = 256  # up to which the zeros of a second matrix for several parts cost less than more products
MOST_UNUSED = 2  # adapters for each one in the step, beyond which they do not
Rows = slice | Tensor  # of a step; a tensor [n] int64
_Pairs = Mapping[int, tuple[Tensor, Tensor]]  # A and B of a layer, by adapter


class _Part(NamedTuple):
    """One of the layers that are computed as one."""

    outputs: slice
    columns: slice  # of the first product
    second: Tensor  # [outputs, columns], scaled
    places: Mapping[int, slice]  # in `columns`, by adapter


class _LowRank(NamedTuple):
    first: Tensor  # [columns, in_features], of all parts
    owners: tuple[int, ...]  # the adapter of each column
    parts: Sequence[_Part]
    products: Sequence[tuple[slice, slice, Tensor]]  # second ones of all: outputs, columns, matrix


class StepAdapters(ABC):
    """Which rows of a step have which adapter."""

    @abstractmethod
    def add(self, out: Tensor, x: Tensor, low_rank: _LowRank) -> None:
        """Adds to out [num_rows, out_features] what the adapters make of x [num_rows, in_features]."""


class GroupedRows(StepAdapters):
    def __init__(self, groups: Sequence[tuple[int, Rows]]) -> None:
        """Each adapter with its rows."""
        self._groups = groups

    def add(self, out: Tensor, x: Tensor, low_rank: _LowRank) -> None:
        for number, rows in self._groups:
            parts = [part for part in low_rank.parts if number in part.places]
            taken = x[rows] if parts else x
            for part in parts:
                place = part.places[number]
                columns = slice(part.columns.start + place.start, part.columns.start + place.stop)
                delta = F.linear(F.linear(taken, low_rank.first[columns]), part.second[:, place])
                if isinstance(rows, slice):
                    out[rows, part.outputs].add_(delta)
                else:
                    out[:, part.outputs].index_add_(0, rows, delta)


class MaskedRows(StepAdapters):
    """The same operators whichever adapters the rows have, so that a CUDA graph can capture it."""

    def __init__(self, numbers: Tensor) -> None:
        """numbers: [num_rows], of adapters."""
        self._numbers = numbers[:, None]
        self._others: dict[tuple[int, ...], Tensor] = {}  # columns of other adapters, by their owners

    def add(self, out: Tensor, x: Tensor, low_rank: _LowRank) -> None:
        others = self._others.get(low_rank.owners)
        if others is None:
            # Made on the device: a graph cannot capture a copy from the host.
            owners = [
                torch.full((1, len(list(same))), owner, dtype=self._numbers.dtype, device=x.device)
                for owner, same in itertools.groupby(low_rank.owners)
            ]
            others = self._others[low_rank.owners] = self._numbers != torch.cat(owners, dim=1)
        # Not a product with zeros: what another adapter makes of a row may be infinite.
        made = F.linear(x, low_rank.first).masked_fill_(others, 0)
        for outputs, columns, second in low_rank.products:
            out[:, outputs].addmm_(made[:, columns], second.t())


class _Step:
    """What the layers of a worker read: the step that is being computed. None: it has no adapters."""

    def __init__(self) -> None:
        self.adapters: StepAdapters | None = None


class AdaptedLinear(Linear):
    def __init__(self, base: Linear, low_rank: _LowRank, step: _Step) -> None:
        super().__init__(base.out_features, base.in_features)
        self.base, self._low_rank, self._step = base, low_rank, step

    def __call__(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self._step.adapters is not None:
            self._step.adapters.add(out, x, self._low_rank)
        return out

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        out = self.base.add_to(residual, x)
        if self._step.adapters is not None:
            self._step.adapters.add(out, x, self._low_rank)
        return out


class AdapterSet:
    """The adapters of a worker. `is_mine` says which modules are among its layers."""

    def __init__(
        self,
        adapters: Sequence[Adapter],
        is_mine: Callable[[str], bool],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.adapters, self._dtype, self._device = adapters, dtype, device
        self._modules = [
            {name: found for name, found in adapter.modules.items() if is_mine(name)} for adapter in adapters
        ]
        self._names = {name for modules in self._modules for name in modules}
        self._loaded: set[str] = set()
        self._files: dict[int, safe_open] = {}
        self._step = _Step()

    def __bool__(self) -> bool:
        """Whether any adapter has a layer of this worker."""
        return bool(self._names)

    # While layers are built.

    def column(self, base: Linear, modules: Sequence[str], shards: Sequence[Shard]) -> Linear:
        """`base` computes these layers as one, of each the outputs of its shard."""
        if self._names.isdisjoint(modules):
            return base
        parts = [self._read(module, rows, WHOLE) for module, rows in zip(modules, shards, strict=True)]
        return self._adapted(base, modules, shards, parts)

    def row(self, base: Linear, module: str, shard: Shard) -> Linear:
        """`base` has the inputs of the shard; the ranks' results are summed, and with them what adapters
        add."""
        if module not in self._names:
            return base
        return self._adapted(base, (module,), (WHOLE,), [self._read(module, WHOLE, shard)])

    def _adapted(
        self, base: Linear, modules: Sequence[str], shards: Sequence[Shard], read: Sequence[_Pairs]
    ) -> Linear:
        sizes = _num_outputs(base.out_features, shards, read)
        parts: list[_Part] = []
        firsts: list[Tensor] = []
        owners: list[int] = []
        num_before = 0
        for module, pairs, size in zip(modules, read, sizes, strict=True):
            start, places = len(owners), dict[int, slice]()
            for number, (a, b) in pairs.items():
                if len(b) != size or a.shape[1] != base.in_features:
                    found, model = f"{len(b)} outputs of {a.shape[1]}", f"{size} of {base.in_features}"
                    name = self.adapters[number].name
                    raise ValueError(f"adapter {name!r} has {found} inputs for {module}, the model {model}")
                places[number] = slice(len(owners) - start, len(owners) - start + len(a))
                owners += [number] * len(a)
                firsts.append(a)
            if pairs:
                second = torch.cat([b for _, b in pairs.values()], dim=1)
                outputs, columns = slice(num_before, num_before + size), slice(start, len(owners))
                parts.append(_Part(outputs, columns, second, places))
            num_before += size
        self._loaded.update(modules)
        low_rank = _LowRank(torch.cat(firsts), tuple(owners), parts, _products(base.out_features, parts))
        return AdaptedLinear(base, low_rank, self._step)

    def _read(self, module: str, rows: Shard, columns: Shard) -> _Pairs:
        """By adapter: A [rank, in] and B [out, rank], scaled, of the outputs in `rows`, inputs in
        `columns`."""
        return {
            number: (
                self._tensor(number, found[module].a, WHOLE, columns),
                self._tensor(number, found[module].b, rows, WHOLE, found[module].scale),
            )
            for number, found in enumerate(self._modules)
            if module in found
        }

    def _tensor(self, number: int, name: str, rows: Shard, columns: Shard, scale: float = 1.0) -> Tensor:
        whole: Tensor = self._file(number).get_tensor(name).float()
        if not bool(whole.isfinite().all()):
            raise ValueError(
                f"adapter {self.adapters[number].name!r}: the tensor {name} has values that are not finite"
            )
        if rows != WHOLE:
            whole = torch.cat([whole[part] for part in rows.slices])
            whole = F.pad(whole, (0, 0, 0, rows.padding))
        if columns != WHOLE:
            assert not columns.padding, "no inputs are padded"
            whole = torch.cat([whole[:, part] for part in columns.slices], dim=1)
        return (whole * scale).to(device=self._device, dtype=self._dtype).contiguous()

    def _file(self, number: int) -> safe_open:
        if number not in self._files:
            self._files[number] = safe_open(self.adapters[number].path, framework="pt")
        return self._files[number]

    def check_all_loaded(self) -> None:
        """To be called once all layers are built. Raises ValueError, naming a tensor, where an adapter is for
        a layer that takes none."""
        self._files.clear()
        for adapter, modules in zip(self.adapters, self._modules, strict=True):
            for name, module in modules.items():
                if name not in self._loaded:
                    what = f"adapter {adapter.name!r} has the tensor {module.a}"
                    raise ValueError(f"{what}, and adapters of {name} are not served")

    # While steps are computed.

    @contextlib.contextmanager
    def of_rows(self, numbers: npt.NDArray[np.int64]) -> Iterator[None]:
        """For a step whose rows have these adapters, by number."""
        self._step.adapters = self._step_adapters(numbers)
        try:
            yield
        finally:
            self._step.adapters = None

    @contextlib.contextmanager
    def of_all(self, number: int) -> Iterator[None]:
        """As `of_rows`, of one adapter, or none, for all rows, however many a layer has."""
        if number != NO_ADAPTER:
            self._step.adapters = GroupedRows([(number, slice(None))])
        try:
            yield
        finally:
            self._step.adapters = None

    @contextlib.contextmanager
    def of_masked(self, numbers: Tensor) -> Iterator[None]:
        """As `of_rows`, of numbers [num_rows] on the device, which may be others at each replay of a
        graph."""
        self._step.adapters = MaskedRows(numbers)
        try:
            yield
        finally:
            self._step.adapters = None

    def _step_adapters(self, numbers: npt.NDArray[np.int64]) -> StepAdapters | None:
        present = np.unique(numbers[numbers != NO_ADAPTER])
        if not len(present):
            return None
        is_few = len(numbers) <= FEW_ROWS and len(self.adapters) <= MOST_UNUSED * len(present)
        if is_few and len(present) > 1:
            return MaskedRows(to_device(numbers, self._device))
        return GroupedRows([(number, self._rows_of(numbers, number)) for number in present.tolist()])

    def _rows_of(self, numbers: npt.NDArray[np.int64], number: int) -> Rows:
        rows = np.flatnonzero(numbers == number)
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(int(rows[0]), int(rows[-1]) + 1)
        return to_device(rows, self._device)


def _products(out_features: int, parts: Sequence[_Part]) -> Sequence[tuple[slice, slice, Tensor]]:
    num_columns = parts[-1].columns.stop
    if len(parts) == 1 or num_columns > FEW_COLUMNS:
        return [(part.outputs, part.columns, part.second) for part in parts]
    second = parts[0].second.new_zeros(out_features, num_columns)
    for part in parts:
        second[part.outputs, part.columns] = part.second
    return [(slice(None), slice(None), second)]


def _num_outputs(total: int, shards: Sequence[Shard], read: Sequence[_Pairs]) -> Sequence[int]:
    """Of each of several layers that are computed as one, of so many outputs in `total`."""
    sizes: list[int | None] = []
    for shard, pairs in zip(shards, read, strict=True):
        if shard != WHOLE:
            sizes.append(sum(part.stop - part.start for part in shard.slices) + shard.padding)
        else:  # of a whole layer its adapters know the size
            sizes.append(next((len(b) for _, b in pairs.values()), None))
    assert sizes.count(None) <= 1, "whole layers are computed as one in pairs at most"
    rest = total - sum(size for size in sizes if size is not None)
    found = [rest if size is None else size for size in sizes]
    if len(found) == 1:  # the base knows it best
        found = [total]
    return found
