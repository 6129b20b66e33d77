"""The abilities of torch's libraries on this processor, by which formats choose a kind of layer."""

from __future__ import annotations

import functools
import platform

import torch


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


@functools.cache
def has_fbgemm() -> bool:
    # torch 2.11 names "x86" as its engine on ARM, too.
    is_engine = torch.backends.quantized.engine in ("x86", "fbgemm")
    return is_x86() and is_engine and hasattr(torch.ops.quantized, "linear_dynamic_fp16")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this type."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if dtype == torch.float32:
        return True
    return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@functools.cache
def is_int8_exact() -> bool:
    """Whether int8 products are summed exactly: without VNNI pairs are added in 16 bits and may overflow."""
    ones = torch.full((1, 64), 255, dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((32, 64), 127, dtype=torch.int8), None)
    scales, zeros = torch.ones(32), torch.zeros(32, dtype=torch.int64)
    y = torch.ops.onednn.qlinear_pointwise(
        ones,
        1.0,
        0,
        weight,
        scales,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return bool((y == 255 * 127 * 64).all())
