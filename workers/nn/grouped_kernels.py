"""Linear layers of the layout of `weights/grouped.py`, in Triton. Never run on a GPU: tests use the
interpreter.

    x [rows, inputs] · tiles of the weight, widened in registers → [+ bias, + residual] → out

Few rows: the weights' bytes bound the time, so many programs read them; where a layer has too few outputs for
that, the inputs are split, and another kernel adds the sums of the splits in their order. Results do not
depend on an order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.nn.weight_tiles import add_products, operand_of
from workers.nn.weights.grouped import CHUNK, GroupedWeight

FEW_ROWS = 64  # up to which inputs are split
WANTED_PROGRAMS = 512  # about four for each multiprocessor of a large GPU
LEAST_SPLIT = 4 * CHUNK  # inputs
SUM_BLOCK = 1024


class GroupedTile(NamedTuple):
    rows: int  # of one program
    columns: int  # outputs of one program
    depth: int  # inputs of one iteration, at most
    num_warps: int


def choose_grouped_tile(dtype: torch.dtype, num_rows: int) -> GroupedTile:
    """16 rows are the least of a dot. Many rows: a tile of the weight is widened once for all of them. The
    tiles are the largest whose numbers stay in the registers of sm_80."""
    if dtype == torch.float32:
        return GroupedTile(16, 32, 32, 4)
    if num_rows <= FEW_ROWS:
        rows = max(16, triton.next_power_of_2(num_rows))
        return GroupedTile(rows, 64 if rows <= 32 else 32, CHUNK, 4)
    return GroupedTile(128, 64, 64, 8)


def split_inputs(num_rows: int, num_tiles: int, num_inputs: int) -> int:
    """The inputs of a split, a multiple of `CHUNK`: enough splits that all tiles together are
    `WANTED_PROGRAMS`, but none too short."""
    num_chunks = -(-num_inputs // CHUNK)
    if num_rows > FEW_ROWS:
        return num_chunks * CHUNK
    num_splits = max(1, min(-(-WANTED_PROGRAMS // num_tiles), num_inputs // LEAST_SPLIT))
    return -(-num_chunks // num_splits) * CHUNK


@triton.jit(do_not_specialize=["num_rows"])
def grouped_linear_kernel(
    x, weight, scales, zeros, bias, residual, out,
    num_rows, num_outputs, num_inputs, stride, num_groups, inputs_of_split,
    GROUP: tl.constexpr, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of outputs, split of inputs). Each split has its own `out`."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    first, split = tl.program_id(1).to(tl.int64) * COLUMNS, tl.program_id(2)
    is_row, is_column = rows < num_rows, first + columns < num_outputs
    of_rows = x + rows.to(tl.int64)[:, None] * num_inputs
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    stop = tl.minimum((split + 1) * inputs_of_split, num_inputs)
    for begin in range(split * inputs_of_split, stop, DEPTH):
        total = add_products(
            total, of_rows, is_row, weight, scales, zeros, first, columns, is_column, begin, num_inputs,
            stride, num_groups, GROUP, KIND, HAS_ZEROS, DEPTH, PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        total += tl.load(bias + first + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None] * num_outputs + first + columns[None, :]
    is_there = is_row[:, None] & is_column[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + places, mask=is_there, other=0.0).to(tl.float32)
    of_split = out + split.to(tl.int64) * num_rows * num_outputs
    tl.store(of_split + places, total.to(out.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_splits", "size"])
def sum_splits_kernel(
    splits, bias, residual, out, num_splits, size, num_outputs,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of the `size` outputs of all rows)."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_there = places < size
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        total += tl.load(splits + split * size + places, mask=is_there, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + places % num_outputs, mask=is_there, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + places, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out + places, total.to(out.dtype.element_ty), mask=is_there)


def grouped_linear(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """x Wᵀ + bias + residual [rows, out] in the type of x [rows, in], added in float32 and rounded once."""
    x = weight.ordered(x).contiguous()
    (num_rows, num_inputs), num_outputs = x.shape, weight.out_features
    if not num_rows:
        return x.new_empty(0, num_outputs)
    operand, tile = operand_of(weight), choose_grouped_tile(x.dtype, num_rows)
    grid = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_outputs, tile.columns)
    of_split = split_inputs(num_rows, grid[0] * grid[1], num_inputs)
    num_splits = triton.cdiv(num_inputs, of_split)
    out = x.new_empty(num_rows, num_outputs)
    is_split = num_splits > 1
    sums = x.new_empty(num_splits, num_rows, num_outputs, dtype=torch.float32) if is_split else out
    of_bias = out if bias is None else bias
    of_residual = out if residual is None else residual.contiguous()
    has_bias, has_residual = bias is not None, residual is not None
    grouped_linear_kernel[(*grid, num_splits)](
        x, operand.numbers, operand.scales, operand.zeros, of_bias, of_residual, sums,
        num_rows, num_outputs, num_inputs, operand.stride, operand.num_groups, of_split,
        operand.group_size, operand.kind, operand.has_zeros, has_bias and not is_split,
        has_residual and not is_split, tile.rows, tile.columns, operand.depth(tile.depth),
        "ieee" if x.dtype == torch.float32 else "tf32", num_warps=tile.num_warps,
    )  # fmt: skip
    if is_split:
        sum_splits_kernel[(triton.cdiv(out.numel(), SUM_BLOCK),)](
            sums, of_bias, of_residual, out, num_splits, out.numel(), num_outputs, has_bias, has_residual,
            SUM_BLOCK,
        )  # fmt: skip
    return out
