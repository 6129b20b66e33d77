"""Experts in Triton: tokens are sorted by the experts that they chose, and blocks of such rows go through the
two projections of their expert. Never run on a GPU: tests use the interpreter.

    plan → gate and up, with silu · mul → down → weighted sum over a token's choices

The host never sees which experts are chosen: grids have room for every possible choice, and programs of empty
blocks return. Results do not depend on an order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAN_TILE = 1024  # choices that a program of the plan sees at once
SUM_COLUMNS = 1024


class ExpertTile(NamedTuple):
    rows: int  # of one block
    columns: int  # outputs of one program
    depth: int  # inputs of one iteration
    num_warps: int


def choose_expert_tile(dtype: torch.dtype, rows_per_expert: float) -> ExpertTile:
    """Few rows: many small programs, as the weights' bytes bound the time. 16 rows are the least of a dot."""
    if dtype == torch.float32:
        return ExpertTile(16, 32, 32, 4)
    return ExpertTile(16, 32, 128, 4) if rows_per_expert <= 16 else ExpertTile(64, 64, 64, 4)


@triton.jit
def _first_block(position, expert, ROWS: tl.constexpr, IS_SPARSE: tl.constexpr):
    """Where the blocks of an expert begin whose rows begin at `position`: there is room for them up to where
    those of the next expert begin."""
    if IS_SPARSE:
        return position
    else:
        return position // ROWS + expert


@triton.jit(do_not_specialize=["num_choices", "num_blocks", "first"])
def plan_experts_kernel(
    chosen, order, blocks, num_choices, num_blocks, first,
    ROWS: tl.constexpr, TILE: tl.constexpr, IS_SPARSE: tl.constexpr,
):  # fmt: skip
    """Program (held expert).

    order: numbers of the choices, sorted by expert. blocks: (expert, start, stop) each, in `order`.
    """
    expert = tl.program_id(0)
    start = 0
    count = 0
    for begin in range(0, num_choices, TILE):
        choices = begin + tl.arange(0, TILE)
        held = tl.load(chosen + choices, mask=choices < num_choices, other=-1).to(tl.int32) - first
        start += tl.sum(((held >= 0) & (held < expert)).to(tl.int32), 0)
        count += tl.sum((held == expert).to(tl.int32), 0)
    position = start
    for begin in range(0, num_choices, TILE):
        choices = begin + tl.arange(0, TILE)
        held = tl.load(chosen + choices, mask=choices < num_choices, other=-1).to(tl.int32) - first
        is_mine = held == expert
        ranks = tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(order + position + ranks, choices, mask=is_mine)
        position += tl.sum(is_mine.to(tl.int32), 0)
    first_block = _first_block(start, expert, ROWS, IS_SPARSE)
    next_block = _first_block(position, expert + 1, ROWS, IS_SPARSE)
    if expert == tl.num_programs(0) - 1:
        next_block = num_blocks
    for block in range(first_block, next_block):
        tl.store(blocks + 3 * block, expert)
        tl.store(blocks + 3 * block + 1, start + (block - first_block) * ROWS)
        tl.store(blocks + 3 * block + 2, position)


@triton.jit
def gate_up_kernel(
    x, weight, order, blocks, out,
    NUM_CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of columns): silu(gate) · up [num_choices, SIZE], in the order of `order`."""
    block = blocks + 3 * tl.program_id(0)
    expert, start, stop = tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = rows < stop, columns < SIZE
        tokens = tl.load(order + rows, mask=is_row, other=0).to(tl.int64) // NUM_CHOSEN
        of_gate = weight + expert * (2 * SIZE * HIDDEN)
        of_up = of_gate + SIZE * HIDDEN
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, HIDDEN, DEPTH):
            dims = begin + tl.arange(0, DEPTH)
            is_dim = dims < HIDDEN
            part = tl.load(
                x + tokens[:, None] * HIDDEN + dims[None, :],
                mask=is_row[:, None] & is_dim[None, :],
                other=0.0,
            )
            places = columns[None, :] * HIDDEN + dims[:, None]
            is_there = is_column[None, :] & is_dim[:, None]
            gate_part = tl.load(of_gate + places, mask=is_there, other=0.0)
            up_part = tl.load(of_up + places, mask=is_there, other=0.0)
            gate = tl.dot(part, gate_part, gate, input_precision=PRECISION)
            up = tl.dot(part, up_part, up, input_precision=PRECISION)
        places = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + places, value, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    inner, weight, order, blocks, out,
    HIDDEN: tl.constexpr, SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of columns): outputs [num_choices, HIDDEN], in the tokens' own order."""
    block = blocks + 3 * tl.program_id(0)
    expert, start, stop = tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = rows < stop, columns < HIDDEN
        choices = tl.load(order + rows, mask=is_row, other=0).to(tl.int64)
        of_expert = weight + expert * (HIDDEN * SIZE)
        value = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, SIZE, DEPTH):
            dims = begin + tl.arange(0, DEPTH)
            is_dim = dims < SIZE
            part = tl.load(
                inner + rows.to(tl.int64)[:, None] * SIZE + dims[None, :],
                mask=is_row[:, None] & is_dim[None, :],
                other=0.0,
            )
            places = columns[None, :] * SIZE + dims[:, None]
            of_part = tl.load(of_expert + places, mask=is_column[None, :] & is_dim[:, None], other=0.0)
            value = tl.dot(part, of_part, value, input_precision=PRECISION)
        places = choices[:, None] * HIDDEN + columns[None, :]
        tl.store(out + places, value.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["first", "num_held"])
def sum_experts_kernel(
    outputs, chosen, shares, out, first, num_held,
    NUM_CHOSEN: tl.constexpr, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (token, tile of columns). Choices of other ranks' experts have no outputs here."""
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < HIDDEN
    total = tl.zeros([COLUMNS], tl.float32)
    for number in range(NUM_CHOSEN):
        choice = token * NUM_CHOSEN + number
        held = tl.load(chosen + choice).to(tl.int32) - first
        if (held >= 0) & (held < num_held):
            value = tl.load(outputs + choice * HIDDEN + columns, mask=is_column, other=0.0).to(tl.float32)
            total += tl.load(shares + choice).to(tl.float32) * value
    tl.store(out + token * HIDDEN + columns, total.to(out.dtype.element_ty), mask=is_column)


class _Plan(NamedTuple):
    order: Tensor  # [num_choices] int32
    blocks: Tensor  # [num_blocks, 3] int32


def _plan(chosen: Tensor, num_held: int, first: int, rows: int) -> _Plan:
    num_choices = chosen.numel()
    # Blocks for any choice: one a choice, or as many as are full and one more for each expert.
    is_sparse = num_choices <= num_choices // rows + num_held
    num_blocks = num_choices if is_sparse else num_choices // rows + num_held
    order = torch.empty(num_choices, dtype=torch.int32, device=chosen.device)
    blocks = torch.empty(num_blocks, 3, dtype=torch.int32, device=chosen.device)
    tile = min(PLAN_TILE, triton.next_power_of_2(num_choices))
    plan_experts_kernel[(num_held,)](
        chosen, order, blocks, num_choices, num_blocks, first, rows, tile, is_sparse
    )
    return _Plan(order, blocks)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, first: int) -> Tensor:
    """As `Kernels.experts`."""
    (num_tokens, num_chosen), (num_held, hidden, size) = chosen.shape, down.shape
    tile = choose_expert_tile(x.dtype, chosen.numel() / num_held)
    plan = _plan(chosen, num_held, first, tile.rows)
    inner, outputs = x.new_empty(chosen.numel(), size), x.new_empty(chosen.numel(), hidden)
    precision, num_blocks = "ieee" if x.dtype == torch.float32 else "tf32", len(plan.blocks)
    shape = tile.rows, tile.columns, tile.depth, precision
    gate_up_kernel[(num_blocks, triton.cdiv(size, tile.columns))](
        x, gate_up, plan.order, plan.blocks, inner, num_chosen, hidden, size, *shape,
        num_warps=tile.num_warps,
    )  # fmt: skip
    down_kernel[(num_blocks, triton.cdiv(hidden, tile.columns))](
        inner, down, plan.order, plan.blocks, outputs, hidden, size, *shape, num_warps=tile.num_warps
    )
    out, columns = torch.empty_like(x), min(SUM_COLUMNS, triton.next_power_of_2(hidden))
    sum_experts_kernel[(num_tokens, triton.cdiv(hidden, columns))](
        outputs, chosen, shares, out, first, num_held, num_chosen, hidden, columns
    )
    return out
