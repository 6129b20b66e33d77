"""Experts in Triton: tokens are sorted by the experts that they chose, and blocks of such rows go through the
two projections of their expert. Never run on a GPU: tests use the interpreter.

    choose → plan → gate and up, with silu · mul → down → weighted sum over a token's choices

The host never sees which experts are chosen: grids have room for every possible choice, and programs of empty
blocks return. Results do not depend on an order in which programs run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.nn.weight_tiles import (
    WeightOperand,
    add_products,
    inputs_of_part,
    operand_of,
    sum_after,
    sum_before,
    widened_part,
)
from workers.nn.weights.grouped import GroupedWeight

PLAN_TILE = 1024  # choices that a program of the plan sees at once
SUM_COLUMNS = 1024


class ExpertTile(NamedTuple):
    rows: int  # of one block
    columns: int  # outputs of one program
    depth: int  # inputs of one iteration
    num_warps: int


def choose_expert_tile(dtype: torch.dtype, rows_per_expert: float, is_dense: bool) -> ExpertTile:
    """Few rows: many small programs, as the weights' bytes bound the time. 16 rows are the least of a dot.
    What is widened in registers takes more of them."""
    if dtype == torch.float32:
        return ExpertTile(16, 32, 32, 4)
    if rows_per_expert <= 16:
        return ExpertTile(16, 32, 128, 4)
    return ExpertTile(64, 64 if is_dense else 32, 64, 4)


@triton.jit
def choose_experts_kernel(
    scores, chosen, shares,
    NUM_EXPERTS: tl.constexpr, EXPERTS_PADDED: tl.constexpr,
    NUM_CHOSEN: tl.constexpr, CHOSEN_PADDED: tl.constexpr,
):  # fmt: skip
    """Program (token)."""
    token, numbers, places = tl.program_id(0), tl.arange(0, EXPERTS_PADDED), tl.arange(0, CHOSEN_PADDED)
    is_expert = numbers < NUM_EXPERTS
    left = tl.load(scores + token * NUM_EXPERTS + numbers, mask=is_expert, other=float("-inf"))
    left = left.to(tl.float32)
    largest = tl.max(left, 0)
    weights = tl.zeros([CHOSEN_PADDED], tl.float32)
    for place in range(NUM_CHOSEN):
        best = tl.max(left, 0)
        expert = tl.min(tl.where(left == best, numbers, EXPERTS_PADDED), 0)
        tl.store(chosen + token * NUM_CHOSEN + place, expert.to(tl.int64))
        weights = tl.where(places == place, tl.exp(best - largest), weights)
        left = tl.where(numbers == expert, float("-inf"), left)
    share = (weights / tl.sum(weights, 0)).to(shares.dtype.element_ty)
    tl.store(shares + token * NUM_CHOSEN + places, share, mask=places < NUM_CHOSEN)


def choose_experts(logits: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """As `Kernels.choose_experts`: a softmax over all experts need not be divided by its sum, as the chosen
    shares are divided by theirs."""
    num_tokens, num_experts = logits.shape
    chosen = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits.device)
    shares = logits.new_empty(num_tokens, num_chosen)
    padded = triton.next_power_of_2(num_experts), triton.next_power_of_2(num_chosen)
    choose_experts_kernel[(num_tokens,)](
        logits, chosen, shares, num_experts, padded[0], num_chosen, padded[1]
    )
    return chosen, shares


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
    x, weight, scales, zeros, order, blocks, out,
    NUM_CHOSEN: tl.constexpr, SIZE: tl.constexpr,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of columns): silu(gate) · up [num_choices, SIZE], in the order of `order`."""
    block = blocks + 3 * tl.program_id(0)
    expert, start, stop = tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        first = tl.program_id(1) * COLUMNS
        is_row, is_column = rows < stop, first + columns < SIZE
        of_gate = expert * (2 * SIZE) + first
        of_up = of_gate + SIZE
        tokens = tl.load(order + rows, mask=is_row, other=0).to(tl.int64) // NUM_CHOSEN
        of_tokens = x + tokens[:, None] * INPUTS
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, INPUTS, DEPTH):
            gates, ups = sum_before(gate, KIND), sum_before(up, KIND)
            for part in tl.static_range(2 if KIND == "int4" else 1):
                dims = inputs_of_part(begin, part, DEPTH, KIND)
                is_there = is_row[:, None] & (dims < INPUTS)[None, :]
                of_x = tl.load(of_tokens + dims[None, :], mask=is_there, other=0.0)
                wide_gate = widened_part(
                    weight, zeros, of_gate, columns, is_column, begin, part, INPUTS, STRIDE, NUM_GROUPS,
                    GROUP, KIND, HAS_ZEROS, DEPTH, x.dtype.element_ty,
                )  # fmt: skip
                wide_up = widened_part(
                    weight, zeros, of_up, columns, is_column, begin, part, INPUTS, STRIDE, NUM_GROUPS,
                    GROUP, KIND, HAS_ZEROS, DEPTH, x.dtype.element_ty,
                )  # fmt: skip
                gates = tl.dot(of_x, wide_gate, gates, input_precision=PRECISION)
                ups = tl.dot(of_x, wide_up, ups, input_precision=PRECISION)
            gate = sum_after(gate, gates, scales, of_gate, columns, is_column, begin, NUM_GROUPS, GROUP, KIND)
            up = sum_after(up, ups, scales, of_up, columns, is_column, begin, NUM_GROUPS, GROUP, KIND)
        places = rows.to(tl.int64)[:, None] * SIZE + first + columns[None, :]
        value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
        tl.store(out + places, value, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def down_kernel(
    inner, weight, scales, zeros, order, blocks, out,
    HIDDEN: tl.constexpr,
    INPUTS: tl.constexpr, STRIDE: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, HAS_ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block, tile of columns): outputs [num_choices, HIDDEN], in the tokens' own order."""
    block = blocks + 3 * tl.program_id(0)
    expert, start, stop = tl.load(block).to(tl.int64), tl.load(block + 1), tl.load(block + 2)
    if start < stop:
        rows, columns = start + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        first = tl.program_id(1) * COLUMNS
        is_row, is_column = rows < stop, first + columns < HIDDEN
        of_outputs = expert * HIDDEN + first
        choices = tl.load(order + rows, mask=is_row, other=0).to(tl.int64)
        of_rows = inner + rows.to(tl.int64)[:, None] * INPUTS
        value = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, INPUTS, DEPTH):
            value = add_products(
                value, of_rows, is_row, weight, scales, zeros, of_outputs, columns, is_column, begin, INPUTS,
                STRIDE, NUM_GROUPS, GROUP, KIND, HAS_ZEROS, DEPTH, PRECISION,
            )  # fmt: skip
        places = choices[:, None] * HIDDEN + first + columns[None, :]
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


def experts(
    x: Tensor,
    gate_up: Tensor | GroupedWeight,
    down: Tensor | GroupedWeight,
    chosen: Tensor,
    shares: Tensor,
    first: int,
) -> Tensor:
    """As `Kernels.experts`."""
    (num_tokens, num_chosen), hidden = chosen.shape, x.shape[1]
    size = down.shape[-1] if isinstance(down, Tensor) else down.in_features
    num_held = len(down) if isinstance(down, Tensor) else down.out_features // hidden
    tile = choose_expert_tile(x.dtype, chosen.numel() / num_held, isinstance(gate_up, Tensor))
    plan = _plan(chosen, num_held, first, tile.rows)
    inner, outputs = x.new_empty(chosen.numel(), size), x.new_empty(chosen.numel(), hidden)
    num_blocks, of_gate_up, of_down = len(plan.blocks), operand_of(gate_up), operand_of(down)
    gate_up_kernel[(num_blocks, triton.cdiv(size, tile.columns))](
        _ordered(gate_up, x), of_gate_up.numbers, of_gate_up.scales, of_gate_up.zeros,
        plan.order, plan.blocks, inner, num_chosen, size, **_constants(of_gate_up, tile, x.dtype),
    )  # fmt: skip
    down_kernel[(num_blocks, triton.cdiv(hidden, tile.columns))](
        _ordered(down, inner), of_down.numbers, of_down.scales, of_down.zeros,
        plan.order, plan.blocks, outputs, hidden, **_constants(of_down, tile, x.dtype),
    )  # fmt: skip
    out, columns = torch.empty_like(x), min(SUM_COLUMNS, triton.next_power_of_2(hidden))
    sum_experts_kernel[(num_tokens, triton.cdiv(hidden, columns))](
        outputs, chosen, shares, out, first, num_held, num_chosen, hidden, columns
    )
    return out


def _ordered(weight: Tensor | GroupedWeight, x: Tensor) -> Tensor:
    return x if isinstance(weight, Tensor) else weight.ordered(x)


def _constants(weight: WeightOperand, tile: ExpertTile, dtype: torch.dtype) -> dict[str, int | bool | str]:
    """Of the kernels of both projections, and their warps."""
    return {
        "INPUTS": weight.num_inputs,
        "STRIDE": weight.stride,
        "NUM_GROUPS": weight.num_groups,
        "GROUP": weight.group_size,
        "KIND": weight.kind,
        "HAS_ZEROS": weight.has_zeros,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": weight.depth(tile.depth),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tile.num_warps,
    }
