"""Rows in float32 times a weight of 16 bits that lies as in its file, each output's inputs side by side. For
processors with AVX2."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.nn.native import operators

IS_BF16 = {torch.float16: 0, torch.bfloat16: 1}


def has_kernel() -> bool:
    """Of this processor."""
    return operators.kernels is not None and bool(operators.kernels.has_half_rows())


def multiply(weight: Tensor, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x [..., in] · Wᵀ + bias + residual: [..., out] float32, of a weight [out, in] in 16 bits."""
    assert x.dtype is torch.float32
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out_features, in_features = weight.shape
    out = x.new_empty((*x.shape[:-1], out_features))
    if out.numel():
        operators.kernels.half_rows(
            out.data_ptr(), x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            0 if residual is None else residual.data_ptr(), out.numel() // out_features, in_features,
            out_features, IS_BF16[weight.dtype],
        )  # fmt: skip
    return out
