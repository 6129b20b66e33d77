"""A quantised matrix in a file, read part by part: what every format makes of a layer's tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.nn.loader import Checkpoint
from workers.nn.weights.grouped import NumberKind

INTEGERS = ("I8",)
NUMBER_TYPES = {"F8_E4M3": NumberKind.FP8, "I8": NumberKind.INT8}


class StoredMatrix(ABC):
    """[out_features, in_features]. What is read is on the checkpoint's device."""

    def __init__(self, name: str, kind: NumberKind, sizes: tuple[int, int], groups: Tensor) -> None:
        """`name`: of the tensor with the numbers. groups: [in] int64, on the host: of each input."""
        self.name, self.kind, self.groups = name, kind, groups
        self.out_features, self.in_features = sizes

    @abstractmethod
    def numbers(self, rows: slice, columns: slice) -> Tensor:
        """Some outputs' numbers for some inputs [n, m], as `arrange` takes them."""

    def put_blocks(self, rows: slice, columns: slice, order: Tensor | None, out: Tensor) -> bool:
        """Fills out [n, m / 2] with numbers of 4 bits as the layout has them, for whole blocks of inputs:
        faster than one by one. False where the format has no short way.

        order: [m], on the host: which of the inputs stands there; None: as they are.
        """
        return False

    @abstractmethod
    def scales(self, rows: slice) -> Tensor:
        """[n, num_groups] float32"""

    def zeros(self, rows: slice) -> Tensor | None:
        """[n, num_groups]; None: the common zero of the kind."""
        return None


class ScaledMatrix(StoredMatrix):
    """Numbers of 8 bits one by one, with a scale for all of them, for each output, or for each block.

    Experts may be stacked in one tensor, each perhaps transposed. Raises ValueError, which names the tensors,
    for a type or sizes that do not fit.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, scale: str, blocks: Sequence[tuple[int, int]] = (),
        zero: str = "", at: int | None = None, is_transposed: bool = False,
    ) -> None:  # fmt: skip
        """`blocks`: outputs and inputs that have one scale, by the settings; those that fit are taken. `at`:
        of the matrices that the tensor stacks."""
        type_name = checkpoint.type_of(name)
        if type_name not in NUMBER_TYPES:
            served = " or ".join(NUMBER_TYPES)
            raise ValueError(
                f"tensor {name!r} is of type {type_name}, with {scale!r} beside it: {served} is served"
            )
        if not checkpoint.has(scale):
            raise ValueError(f"tensor {name!r} is of type {type_name}, but there is no {scale!r} beside it")
        if not checkpoint.is_plain(scale):
            raise ValueError(f"tensor {scale!r} is of type {checkpoint.type_of(scale)}, which is no scale's")
        shapes = [checkpoint.shape(tensor)[at is not None :] for tensor in (name, scale)]
        if len(shapes[0]) != 2:
            raise ValueError(f"tensor {name!r} has the shape {checkpoint.shape(name)}, which is no matrix's")
        if is_transposed:
            shapes = [shape[::-1] for shape in shapes]
        self._checkpoint, self._scale, self._zero = checkpoint, scale, zero
        self._at, self._is_transposed = at, is_transposed
        sizes = shapes[0][0], shapes[0][1]
        found = _block_of(shapes[1], sizes, blocks)
        if found is None:
            raise ValueError(
                f"tensor {scale!r} has the shape {shapes[1]}, which does not fit {name!r} of {sizes}"
            )
        self._rows_per_scale, per_group = found
        self._check_zeros(type_name)
        super().__init__(name, NUMBER_TYPES[type_name], sizes, torch.arange(sizes[1]) // per_group)

    def _check_zeros(self, type_name: str) -> None:
        if self._zero and not self._checkpoint.has(self._zero):
            self._zero = ""
        if self._zero and type_name not in INTEGERS:
            if bool(self._checkpoint.read(self._zero).float().any()):
                raise ValueError(
                    f"tensor {self._zero!r} has zeros other than 0, beside numbers of {type_name}"
                )
            self._zero = ""

    def numbers(self, rows: slice, columns: slice) -> Tensor:
        ranges = (columns, rows) if self._is_transposed else (rows, columns)
        found = self._checkpoint.read(self.name, *ranges, self._at).to(self._checkpoint.device)
        return found.t() if self._is_transposed else found

    def scales(self, rows: slice) -> Tensor:
        return self._of_rows(self._scale, rows).float()

    def zeros(self, rows: slice) -> Tensor | None:
        if not self._zero:
            return None
        found = self._of_rows(self._zero, rows)
        return found.to(torch.int8) if bool(found.any()) else None

    def _of_rows(self, name: str, rows: slice) -> Tensor:
        """[n, num_groups]"""
        found = read_at(self._checkpoint, name, self._at).to(self._checkpoint.device)
        num_groups = int(self.groups[-1]) + 1
        table = found.t() if self._is_transposed and found.ndim == 2 else found
        of_block = torch.arange(rows.start, rows.stop, device=table.device) // self._rows_per_scale
        return table.reshape(-1, num_groups)[of_block]


def expect_type(checkpoint: Checkpoint, name: str, *wanted: str) -> None:
    """Raises ValueError for a tensor of another type, or one that is missing."""
    if not checkpoint.has(name):
        raise ValueError(f"tensor {name!r} is missing beside the layer's other tensors")
    if checkpoint.type_of(name) not in wanted:
        names = " or ".join(wanted)
        raise ValueError(f"tensor {name!r} is of type {checkpoint.type_of(name)}, not {names}")


def read_at(checkpoint: Checkpoint, name: str, at: int | None) -> Tensor:
    """A whole tensor, or one of the matrices that it stacks; also without any axis."""
    return checkpoint.read(name) if at is None else checkpoint.read(name, slice(at, at + 1))[0]


def _block_of(
    scale: Sequence[int], sizes: tuple[int, int], blocks: Sequence[tuple[int, int]]
) -> tuple[int, int] | None:
    """How many outputs and inputs have one scale; None where the shape of the scales does not say it."""
    rows, columns = sizes
    if all(size == 1 for size in scale):
        return sizes
    grid = [size for size in scale if size != 1] if len(scale) == 4 else list(scale)
    for block in blocks:
        if grid == [-(-rows // block[0]), -(-columns // block[1])]:
            return block
    if grid in ([rows], [rows, 1]):
        return 1, columns
    if len(grid) != 2 or grid[0] != rows or columns % grid[1]:
        return None
    return 1, columns // grid[1]
