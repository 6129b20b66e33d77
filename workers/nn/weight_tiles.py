"""Tiles of a weight, widened in registers, for the Triton kernels of any layer: dense, or of the layout of
`weights/grouped.py`. Never run on a GPU: tests use the interpreter.

Numbers minus their zero are whole and at most 255, or have four digits, so that every type of activations
holds them exactly. A tile has them without their scale: it lies in one group of each output, so the scale
multiplies the products' sum, in float32. That costs rows × columns multiplications a tile and no rounding;
widened weights times their scales would cost depth × columns, and be rounded to the activations' type.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.nn.weights.grouped import GroupedWeight, NumberKind

DENSE = "dense"  # beside the kinds of `NumberKind`: the activations' own type


class WeightOperand(NamedTuple):
    """A weight as kernels take it: pointers, and numbers of its layout."""

    numbers: Tensor
    scales: Tensor  # `numbers` where there are none, and nothing is read
    zeros: Tensor
    num_inputs: int
    stride: int  # elements of `numbers` from one output to the next
    num_groups: int
    group_size: int
    kind: str
    has_zeros: bool

    def depth(self, most: int) -> int:
        """Inputs of a tile: of one group."""
        return most if self.kind == DENSE else min(most, self.group_size)


def operand_of(weight: Tensor | GroupedWeight) -> WeightOperand:
    """Of a dense weight […, out, in], contiguous, or of a grouped one."""
    if isinstance(weight, Tensor):
        num_inputs = weight.shape[-1]
        return WeightOperand(weight, weight, weight, num_inputs, num_inputs, 1, num_inputs, DENSE, False)
    numbers = weight.numbers
    if weight.kind is NumberKind.FP8:
        numbers = numbers.view(torch.uint8)
    zeros = numbers if weight.zeros is None else weight.zeros
    return WeightOperand(
        numbers, weight.scales, zeros, weight.num_inputs, numbers.stride(0), weight.scales.shape[1],
        weight.group_size, weight.kind.value, weight.zeros is not None,
    )  # fmt: skip


@triton.jit
def inputs_of_part(begin, part, DEPTH: tl.constexpr, KIND: tl.constexpr):
    """The inputs [DEPTH / parts] of one part of a tile that begins at input `begin`.

    Of 4 bits a byte has two inputs that stand 16 apart: what is in the low halves is one part, what is in the
    high halves the other, and the compiler makes one load of the bytes of both. Other kinds have one part.
    """
    if KIND == "int4":
        places = tl.arange(0, DEPTH // 2)
        return begin + places // 16 * 32 + part * 16 + places % 16
    else:
        return begin + tl.arange(0, DEPTH)


@triton.jit
def _widened_fp8(stored):
    """e4m3 to float16, by the bits: GPUs before sm_89 have no instruction for it. Both have a sign, then the
    exponent; its bias differs by 8. Exact, with the numbers below the least normal one; NaN would be 480."""
    bits = stored.to(tl.uint16)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def widened_part(
    weight, zeros, first, columns, is_column, begin, part, num_inputs, stride, num_groups,
    GROUP: tl.constexpr, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, DEPTH: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """[DEPTH / parts, columns] in TYPE, without scales: the inputs of `inputs_of_part`, for the outputs
    `first` (int64) + `columns`."""
    of_first = weight + first * stride
    if KIND == "dense":
        dims = begin + tl.arange(0, DEPTH)
        is_there = is_column[None, :] & (dims < num_inputs)[:, None]
        return tl.load(of_first + (columns[None, :] * stride + dims[:, None]), mask=is_there, other=0.0)
    else:
        # Rows are padded to whole tiles.
        places = begin // 2 + tl.arange(0, DEPTH // 2) if KIND == "int4" else begin + tl.arange(0, DEPTH)
        stored = tl.load(
            of_first + (columns[None, :] * stride + places[:, None]), mask=is_column[None, :], other=0
        )
        if KIND == "fp8":
            return _widened_fp8(stored).to(TYPE)
        else:
            if KIND == "int4":
                stored = (stored >> (4 * part)) & 15
            wide = stored.to(tl.float32)
            if HAS_ZEROS:
                of_group = (first + columns) * num_groups + begin // GROUP
                zero = tl.load(zeros + of_group, mask=is_column, other=0).to(tl.float32)
                wide = wide - zero[None, :]
            elif KIND == "int4":
                wide = wide - 8.0
            return wide.to(TYPE)


@triton.jit
def sum_before(total, KIND: tl.constexpr):
    """What the products of a tile are added to."""
    if KIND == "dense":
        return total
    else:
        return tl.zeros_like(total)


@triton.jit
def sum_after(
    total, products, scales, first, columns, is_column, begin, num_groups,
    GROUP: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """`total` with the products of the tile, which were added to `sum_before`, times the group's scales."""
    if KIND == "dense":
        return products
    else:
        of_group = (first + columns) * num_groups + begin // GROUP
        return total + products * tl.load(scales + of_group, mask=is_column, other=0.0)[None, :]


@triton.jit
def add_products(
    total, of_rows, is_row, weight, scales, zeros, first, columns, is_column, begin, num_inputs, stride,
    num_groups,
    GROUP: tl.constexpr, KIND: tl.constexpr, HAS_ZEROS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`total` [rows, columns] with the products of one tile of inputs. `of_rows` [rows, 1]: where each row of
    inputs begins."""
    products = sum_before(total, KIND)
    for part in tl.static_range(2 if KIND == "int4" else 1):
        dims = inputs_of_part(begin, part, DEPTH, KIND)
        is_there = is_row[:, None] & (dims < num_inputs)[None, :]
        of_x = tl.load(of_rows + dims[None, :], mask=is_there, other=0.0)
        wide = widened_part(
            weight, zeros, first, columns, is_column, begin, part, num_inputs, stride, num_groups,
            GROUP, KIND, HAS_ZEROS, DEPTH, of_x.dtype,
        )  # fmt: skip
        products = tl.dot(of_x, wide, products, input_precision=PRECISION)
    return sum_after(total, products, scales, first, columns, is_column, begin, num_groups, GROUP, KIND)
