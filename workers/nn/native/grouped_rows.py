"""Rows times a quantised weight in the layout of `workers/nn/weights/grouped.py`, which is read as it is.

A few rows read it at the memory's rate, in two ways: with x in float32 and exact weights, or with x quantised
to 8 bits, which takes fewer instructions. For AVX2 and AVX512-VNNI. AMX multiplies many rows, in bfloat16,
with parts of the weight that it makes dense meanwhile. Where there is no AMX, `widen` makes parts of the
weight dense for torch's product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators
from workers.nn.weights.grouped import GroupedWeight, NumberKind

KINDS = {NumberKind.INT4: 0, NumberKind.INT8: 1, NumberKind.FP8: 2}  # grouped.inc has the same
TILES = "amx"  # the kernel for x in bfloat16
LINE = 64  # bytes


def grouped_versions() -> tuple[str, ...]:
    """Of this processor: `avx2`, `vnni`, `amx`; the last one is the fastest for many rows."""
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

    is_quantized: each row in 8 bits, with a scale of its own; not for weights in FP8, nor by `amx`, which
    takes only bfloat16, and rounds weights to it. Raises ValueError for those, and for x of another width
    than the weight, beyond which the kernels would read.
    """
    if kernel == TILES and (is_quantized or x.dtype is not torch.bfloat16):
        raise ValueError("AMX multiplies x in bfloat16")
    if x.shape[1] != weight.in_features:
        raise ValueError(f"x has {x.shape[1]} columns, a quantised weight {weight.in_features} inputs")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out = x.new_empty((len(x), weight.out_features))
    if not len(x):
        return out
    size = operators.kernels.grouped_scratch(
        kernel, len(x), weight.num_inputs, weight.group_size, int(is_quantized)
    )
    scratch = torch.empty(LINE + size, dtype=torch.uint8)
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
