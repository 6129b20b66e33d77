"""Rows times a quantised weight in the layout of `workers/nn/weights/grouped.py`, which is read as it is.

A few rows read it at the memory's rate, in two ways: with x in float32 and exact weights, or with x quantised
to 8 bits, which takes fewer instructions. Many rows are multiplied by parts of the weight that `widen` has
made dense. For AVX2 and AVX512-VNNI.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.weights.grouped import GroupedWeight, NumberKind

KINDS = {NumberKind.INT4: 0, NumberKind.INT8: 1, NumberKind.FP8: 2}  # grouped.inc has the same
MOST = 4  # rows at a time; kernels.h has the same sizes
LINE = 64  # bytes


def grouped_versions() -> tuple[str, ...]:
    """Of this processor, the slowest first: `avx2`, `vnni`."""
    return () if operators.kernels is None else tuple(operators.kernels.grouped_versions())


def multiply(
    kernel: str,
    weight: GroupedWeight,
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    is_quantized: bool,
) -> Tensor:
    """x [rows, in_features] · Wᵀ + bias + residual: [rows, out], all in the type of x: float32 or bfloat16.

    is_quantized: each row in 8 bits, with a scale of its own; not for weights in FP8. Raises ValueError for x
    of another width than the weight: the kernels would read beyond it.
    """
    if x.shape[1] != weight.in_features:
        raise ValueError(f"x has {x.shape[1]} columns, a quantised weight {weight.in_features} inputs")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = x.new_empty((len(x), weight.out_features))
    if not len(x):
        return out
    padded, groups = -(-weight.num_inputs // 128) * 128, weight.scales.shape[1]
    of_row = LINE + (-(-groups // 16) * LINE + padded if is_quantized else 6 * padded)
    padded_rows = -(-len(x) // MOST) * MOST
    scratch = torch.empty(2 * LINE + padded // 8 + padded_rows * of_row, dtype=torch.uint8)
    place = scratch.data_ptr() + -scratch.data_ptr() % LINE
    order = 0 if weight.order is None else weight.order.data_ptr()
    operators.kernels.grouped_rows(
        kernel, out.data_ptr(), x.data_ptr(), *_addresses(weight), 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), order, place, len(x), weight.in_features,
        weight.num_inputs, weight.out_features, KINDS[weight.kind], weight.group_size,
        int(is_quantized), operators.IS_HALF[x.dtype],
    )  # fmt: skip
    return out


def widen(kernel: str, weight: GroupedWeight, part: slice, out: Tensor) -> None:
    """As `GroupedWeight.widened` of these outputs, into `out` [n, num_inputs] in float32 or bfloat16."""
    zeros = None if weight.zeros is None else weight.zeros[part]
    of_part = weight._replace(numbers=weight.numbers[part], scales=weight.scales[part], zeros=zeros)
    operators.kernels.widen_grouped(
        kernel, out.data_ptr(), 0, *_addresses(of_part), 0, 0, 0, 0, 0, weight.in_features, weight.num_inputs,
        len(out), KINDS[weight.kind], weight.group_size, 0, operators.IS_HALF[out.dtype],
    )  # fmt: skip


def _addresses(weight: GroupedWeight) -> tuple[int, int, int]:
    zeros = 0 if weight.zeros is None else weight.zeros.data_ptr()
    return weight.numbers.data_ptr(), weight.scales.data_ptr(), zeros
