"""Small layers as one Triton kernel each, where plain torch would launch several.

For GPUs and Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_rms_norm_kernel(
    x, delta, weight, out, eps, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr, HAS_DELTA: tl.constexpr
):
    """Program (row)."""
    columns = tl.arange(0, SIZE_PADDED)
    places, is_inside = tl.program_id(0).to(tl.int64) * SIZE + columns, columns < SIZE
    value = tl.load(x + places, mask=is_inside, other=0.0)
    if HAS_DELTA:
        # rounded as the residual stream is
        value = value + tl.load(delta + places, mask=is_inside, other=0.0)
        tl.store(x + places, value, mask=is_inside)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    gain = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + places, (wide * scale * gain).to(out.dtype.element_ty), mask=is_inside)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta, both [rows, size]; then the norm of x, computed in float32."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    add_rms_norm_kernel[(x.shape[0],)](
        x,
        x if delta is None else delta,
        weight,
        out,
        eps,
        size,
        triton.next_power_of_2(size),
        delta is not None,
    )
    return out


@triton.jit
def silu_mul_kernel(gate_up, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(
        out + row * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=is_inside
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of [rows, 2 · size], gate first."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(size))
    silu_mul_kernel[(rows, triton.cdiv(size, block))](gate_up, out, size, block)
    return out
