"""Tensors of dense weights in the parts that a rank holds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.nn.loader import FILE_DTYPES, Checkpoint
from workers.nn.native.huge_pages import advise
from workers.nn.weights.shard import WHOLE, Shard


def load_side_by_side(checkpoint: Checkpoint, names: Sequence[str], shards: Sequence[Shard]) -> Tensor:
    """The rows of each tensor's shard, concatenated."""
    parts = [load_part(checkpoint, name, rows) for name, rows in zip(names, shards, strict=True)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def load_as_stored(
    checkpoint: Checkpoint, names: Sequence[str], shards: Sequence[Shard], columns: Shard = WHOLE
) -> Tensor:
    """As `load_side_by_side` or, with `columns`, as `load_part`, but in the type of the file, which the
    tensors share."""
    sizes = [checkpoint.shape(name) for name in names]
    for name, size, shard in zip(names, sizes, shards, strict=True):
        check_part(name, size, shard, columns)
    ranges = [
        (name, slice(*part.indices(size[0])[:2]), shard.padding if number == len(shard.slices) else 0)
        for name, size, shard in zip(names, sizes, shards, strict=True)
        for number, part in enumerate(shard.slices, 1)
    ]
    across = [slice(*part.indices(sizes[0][1])[:2]) for part in columns.slices]
    width = sum(part.stop - part.start for part in across) + columns.padding
    height = sum(rows.stop - rows.start + padding for _, rows, padding in ranges)
    made = torch.empty(height, width, dtype=FILE_DTYPES[checkpoint.type_of(names[0])])
    advise(made.data_ptr(), made.nbytes)
    top = 0
    for name, rows, padding in ranges:
        bottom, left = top + rows.stop - rows.start, 0
        for part in across:
            right = left + part.stop - part.start
            made[top:bottom, left:right] = checkpoint.read(name, rows, part)
            left = right
        made[top:bottom, left:] = 0
        made[bottom : bottom + padding] = 0
        top = bottom + padding
    return made


def check_part(name: str, size: Sequence[int], rows: Shard, columns: Shard) -> None:
    """Raises ValueError for a tensor of other sizes than the model's settings have."""
    assert WHOLE in (rows, columns), "no layer is cut both ways"
    for axis, shard in ((0, rows), (1, columns)):
        if shard.size:
            shard.check(size[axis], f"axis {axis} of {name!r}")


def load_part(
    checkpoint: Checkpoint, name: str, rows: Shard = WHOLE, columns: Shard = WHOLE, at: int | None = None
) -> Tensor:
    """A rank's rows or columns of a tensor, as a copy in the model's type. One of the two must be `WHOLE`.

    `at`: of one of the matrices that the tensor stacks. Raises ValueError for a tensor of other sizes than
    the model's settings have.
    """
    check_part(name, checkpoint.shape(name)[at is not None :], rows, columns)
    if columns == WHOLE:
        parts, axis, padding = [checkpoint.load(name, part, at=at) for part in rows.slices], 0, rows.padding
    else:
        loaded = [checkpoint.load(name, columns=part, at=at) for part in columns.slices]
        parts, axis, padding = loaded, 1, columns.padding
    if padding:
        shape = list(parts[0].shape)
        shape[axis] = padding
        parts.append(parts[0].new_zeros(shape))
    return torch.cat(parts, dim=axis) if len(parts) > 1 else parts[0]
