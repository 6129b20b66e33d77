"""What all formats of quantised checkpoints have in common: a matrix is read part by part into the one layout
of `grouped.py`, and computed there. A format says only how a layer's tensors become numbers and scales.

    format.matrix(checkpoint, module) → StoredMatrix        fp8.py, awq.py, gptq.py, compressed_tensors.py, …

Whether a layer is quantised is decided by what the file has; a checkpoint's list of exceptions is only
compared with it. Weights are dequantised exactly, and `--activation-quantization` says what multiplies them:
what a file says of activations (`input_scale`, a scheme of 8 bits) is for other servers, and not needed.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workers.nn.fused import Kernels
from workers.nn.loader import Checkpoint
from workers.nn.weights.base import Activations, Experts, Format, Linear
from workers.nn.weights.dense import FUSED, Dense, are_transposed
from workers.nn.weights.experts import put_together
from workers.nn.weights.grouped import (
    BLOCK,
    Arrangement,
    GroupedLinear,
    GroupedWeight,
    NumberKind,
    choose_product,
)
from workers.nn.weights.matrices import StoredMatrix
from workers.nn.weights.shard import WHOLE, ExpertsShard, Shard
from workers.nn.weights.side_by_side import SideBySide

logger = logging.getLogger(__name__)
PART_NUMBERS = 1 << 24  # that are unpacked at a time: never a whole output layer
KEPT = 4  # arrangements: of attention, of its output, and of both projections of an MLP
# Tensors of a layer that only quantised ones have; of experts in one tensor, behind its name.
MARKS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", "_scale_inv", "_scale")
# Beside a layer's other tensors: factors of weights or of inputs, which other ways of quantising have.
OTHER_FACTORS = ("pre_quant_scale", "weight_scale_2", "weight_global_scale", "weight_chan_scale")
SCALES = ("scales", "weight_scale", "weight_scale_inv")


class _Piece(NamedTuple):
    """Some outputs of a matrix, and weights of 0 behind them."""

    matrix: StoredMatrix
    rows: slice
    padding: int = 0

    @property
    def num_rows(self) -> int:
        return int(self.rows.stop - self.rows.start)


class StoredFormat(Format):
    def __init__(self) -> None:
        self._dense: Format = Dense()
        self._is_exported = False
        self._activations = Activations.AUTO
        self._arranged: deque[tuple[Tensor, Arrangement]] = deque(maxlen=KEPT)
        self._warned: set[bool] = set()

    @abstractmethod
    def matrix(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        """Of a layer that the format holds. Raises ValueError, which names the tensor, for what is not as the
        format has it."""

    @abstractmethod
    def says(self, module: str) -> bool | None:
        """Whether the checkpoint's settings call a layer quantised; None where they are silent."""

    def stacked(self, checkpoint: Checkpoint, name: str, at: int, is_transposed: bool) -> StoredMatrix:
        """One of the experts that a tensor stacks. Raises ValueError where the format has none of these."""
        raise ValueError(f"tensor {name!r} stacks experts, which {self.name!r} has one by one")

    def export(self, dense: Format) -> None:
        """From now on layers are dequantised, and dense ones of that format."""
        self._dense, self._is_exported = dense, True

    def choose_activations(self, activations: Activations) -> None:
        self._activations = activations

    def check_device(self, device: torch.device) -> None:
        """The layout computes on every device."""

    def holds(self, checkpoint: Checkpoint, module: str) -> bool:
        if any(checkpoint.has(module + mark) for mark in MARKS):
            return True
        names = f"{module}.weight", module
        return any(checkpoint.has(name) and not checkpoint.is_plain(name) for name in names)

    def compare(self, module: str, is_held: bool) -> None:
        said = self.says(module)
        if said is None or said == is_held or is_held in self._warned:
            return
        self._warned.add(is_held)
        what = ("quantised", "an exception") if is_held else ("not quantised", "no exception")
        logger.warning(
            "%s is %s in the checkpoint's files, but by its settings it is %s: what the files have counts "
            "(said for the first such layer)",
            module, *what,
        )  # fmt: skip

    def column(
        self, checkpoint: Checkpoint, modules: Sequence[str], shards: Sequence[Shard], bias: Tensor | None
    ) -> Linear:
        pieces = [
            piece
            for module, shard in zip(modules, shards, strict=True)
            for piece in _pieces(self._known(checkpoint, module), shard)
        ]
        return self._column(checkpoint, pieces, bias)

    def row(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Linear:
        # Makers add biases of 0 to layers that have none.
        name = f"{module}.bias"
        if checkpoint.has(name) and bool(checkpoint.read(name).any()):
            raise ValueError(f"tensor {name!r} is not 0, but the model has no such bias")
        return self._row(checkpoint, self._known(checkpoint, module), shard)

    def dense(self, checkpoint: Checkpoint, module: str, shard: Shard) -> Tensor:
        pieces = list(_pieces(self._known(checkpoint, module), shard))
        return self._read(checkpoint, pieces, WHOLE).dense(checkpoint.dtype)

    def experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard, kernels: Kernels | None
    ) -> Experts:
        layers = [
            (self._column(checkpoint, gate_up, None), self._row(checkpoint, down, shard.intermediate))
            for gate_up, down in self._experts(checkpoint, module, shard)
        ]
        return put_together(layers, shard.held.start, kernels)

    def _experts(
        self, checkpoint: Checkpoint, module: str, shard: ExpertsShard
    ) -> Iterator[tuple[list[_Piece], StoredMatrix]]:
        """Of each expert: the gate and up projections of the rank's part, and the down projection."""
        is_stacked = checkpoint.has(f"{module}.gate_up_proj")
        is_transposed = is_stacked and are_transposed(checkpoint, module, shard)
        for number in shard.held:
            if is_stacked:  # of the sizes that the model has, or `are_transposed` would have refused them
                gate_up, down = (
                    self.stacked(checkpoint, f"{module}.{name}", number, is_transposed) for name in FUSED
                )
                yield list(_pieces(gate_up, shard.gate_up)), down
                continue
            names = [f"{module}.{number}.{name}_proj" for name in ("gate", "up", "down")]
            gate, up, down = (self._known(checkpoint, name) for name in names)
            for matrix, found in ((gate, gate.in_features), (up, up.in_features), (down, down.out_features)):
                shard.check_hidden(found, matrix.name)
            yield [piece for matrix in (gate, up) for piece in _pieces(matrix, shard.intermediate)], down

    def _known(self, checkpoint: Checkpoint, module: str) -> StoredMatrix:
        """As `matrix`. Raises ValueError also for what would be another matrix than the format's formula
        gives."""
        for name in (f"{module}.{other}" for other in OTHER_FACTORS):
            if checkpoint.has(name):
                raise ValueError(
                    f"tensor {name!r} changes the layer's weights or inputs, in a way that {self.name!r} is "
                    "not served in"
                )
        found = self.matrix(checkpoint, module)
        for name in (f"{module}.{scale}" for scale in SCALES):
            if checkpoint.has(name) and not checkpoint.is_plain(name):
                raise ValueError(
                    f"tensor {name!r} is of type {checkpoint.type_of(name)}, which is no scale's"
                )
        return found

    def tied(self, checkpoint: Checkpoint, name: str, shard: Shard) -> Linear:
        return self._dense.tied(checkpoint, name, shard)

    def pack(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return self._dense.pack(weight, bias)

    def _linear(self, checkpoint: Checkpoint, weight: GroupedWeight, bias: Tensor | None) -> Linear:
        if self._is_exported:
            return self._dense.pack(weight.dense(checkpoint.dtype), bias)
        return GroupedLinear(weight, bias, partial(choose_product, activations=self._activations))

    def _column(self, checkpoint: Checkpoint, pieces: Sequence[_Piece], bias: Tensor | None) -> Linear:
        runs = _runs(pieces)
        if len(runs) == 1:
            return self._linear(checkpoint, self._read(checkpoint, pieces, WHOLE), bias)
        parts = [self._linear(checkpoint, self._read(checkpoint, run, WHOLE), None) for run in runs]
        return SideBySide(parts, bias)

    def _row(self, checkpoint: Checkpoint, matrix: StoredMatrix, shard: Shard) -> Linear:
        assert not shard.padding, "no model pads inputs"
        shard.check(matrix.in_features, f"the inputs of {matrix.name!r}")
        whole = _Piece(matrix, slice(0, matrix.out_features))
        return self._linear(checkpoint, self._read(checkpoint, [whole], shard), None)

    def _read(self, checkpoint: Checkpoint, pieces: Sequence[_Piece], columns: Shard) -> GroupedWeight:
        """Pieces of one run, one below the other, with some of their inputs."""
        first = pieces[0].matrix
        ranges = [_bounded(part, first.in_features) for part in columns.slices]
        used, groups = torch.unique(torch.cat([first.groups[part] for part in ranges]), return_inverse=True)
        arrangement = self._arrangement(groups)
        picked = None if len(used) == int(first.groups.max()) + 1 else used.to(checkpoint.device)
        zeros = [piece.matrix.zeros(piece.rows) for piece in pieces]
        count, has_zeros = (
            sum(piece.num_rows + piece.padding for piece in pieces),
            any(found is not None for found in zeros),
        )
        weight = arrangement.empty(first.kind, count, has_zeros, checkpoint.device)
        is_short = arrangement.has_blocks and first.kind is NumberKind.INT4 and _are_blocks(ranges)
        row = 0
        for piece, of_piece in zip(pieces, zeros, strict=True):
            scales = piece.matrix.scales(piece.rows)
            for start in range(0, piece.num_rows, step := _part_size(first.in_features)):
                part = slice(start, min(start + step, piece.num_rows))
                rows = slice(piece.rows.start + part.start, piece.rows.start + part.stop)
                place = slice(row + part.start, row + part.stop)
                beside = (
                    _picked(scales[part], picked),
                    None if of_piece is None else _picked(of_piece[part], picked),
                )
                if is_short:
                    blocks = arrangement.blocks(weight, place, *beside)
                    if piece.matrix.put_blocks(rows, ranges[0], arrangement.order, blocks):
                        continue
                numbers = [piece.matrix.numbers(rows, columns) for columns in ranges]
                arrangement.put(weight, place, numbers[0] if len(numbers) == 1 else _joined(numbers), *beside)
            row += piece.num_rows + piece.padding
            arrangement.nothing(weight, slice(row - piece.padding, row))
        return weight

    def _arrangement(self, groups: Tensor) -> Arrangement:
        """Kept for the next layer, whose groups mostly are the same."""
        for known, arrangement in self._arranged:
            if torch.equal(known, groups):
                return arrangement
        self._arranged.append((groups, Arrangement(groups)))
        return self._arranged[-1][1]


def _part_size(in_features: int) -> int:
    """Outputs that are read at a time: whole words of them."""
    return max(8, PART_NUMBERS // in_features // 8 * 8)


def _picked(values: Tensor, groups: Tensor | None) -> Tensor:
    """[n, groups] of [n, num_groups]; None: all."""
    return values if groups is None else values[:, groups]


def _are_blocks(ranges: Sequence[slice]) -> bool:
    return len(ranges) == 1 and ranges[0].start % BLOCK == 0 and ranges[0].stop % BLOCK == 0


def _joined(numbers: Sequence[Tensor]) -> Tensor:
    """Side by side; float8 has no operator for it."""
    return torch.cat([part.view(torch.uint8) for part in numbers], dim=1).view(numbers[0].dtype)


def _pieces(matrix: StoredMatrix, shard: Shard) -> Iterator[_Piece]:
    shard.check(matrix.out_features, f"the outputs of {matrix.name!r}")
    *others, last = (_bounded(part, matrix.out_features) for part in shard.slices)
    yield from (_Piece(matrix, part) for part in others)
    yield _Piece(matrix, last, shard.padding)


def _bounded(part: slice, size: int) -> slice:
    return slice(*part.indices(size)[:2])


def _runs(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Neighbours whose layouts are one."""
    runs: list[list[_Piece]] = []
    for piece in pieces:
        if runs and _are_alike(runs[-1][0].matrix, piece.matrix):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _are_alike(one: StoredMatrix, other: StoredMatrix) -> bool:
    return one.kind == other.kind and torch.equal(one.groups, other.groups)
