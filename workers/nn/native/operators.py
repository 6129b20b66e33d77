"""Operators for CPUs, compiled when the package is installed where there is a C++ compiler.

Each has a twin of torch's operators (`workers/nn/layers.py`, `workers/llm/attention/torch.py`), which is
used where `takes` says no: other devices and types, exports, and installations without a compiler. Arithmetic
is in float32, results are rounded once. They compute on torch's own threads.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
INTERFACE = 4  # of module.cpp
kernels: Any = None
with contextlib.suppress(ImportError):
    kernels = importlib.import_module("workers.nn.native._kernels")
    if getattr(kernels, "INTERFACE", 0) != INTERFACE:
        logger.warning("the compiled kernels are of another version: run python setup.py build_ext --inplace")
        kernels = None

LANES = 16  # floats of a vector
TILE = 64  # tokens whose scores a thread has at once
PART = 256  # tokens of a context that one thread attends to at a time
IS_HALF = {torch.float32: 0, torch.bfloat16: 1}


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels for tensors like these: contiguous, of one type, on the CPU. An export gives
    tensors of other classes."""
    if kernels is None:
        return False
    dtype = tensors[0].dtype
    return dtype in IS_HALF and all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype is dtype
        and x.device.type == "cpu"
        and x.is_contiguous()
        for x in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension. x must not be empty."""
    assert kernels is not None
    out, size = torch.empty_like(x), x.shape[-1]
    kernels.rms_norm(
        IS_HALF[x.dtype], out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps
    )
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) · up of […, 2 · size], gate first."""
    assert kernels is not None
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    kernels.silu_mul(
        IS_HALF[out.dtype], out.data_ptr(), gate_up.data_ptr(), gate_up.numel() // (2 * size), size
    )
    return out


def quick_gelu_(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), in place."""
    assert kernels is not None
    return _activate_(kernels.quick_gelu, x)


def gelu_tanh_(x: Tensor) -> Tensor:
    """GELU in its approximation by tanh, in place."""
    assert kernels is not None
    return _activate_(kernels.gelu_tanh, x)


def _activate_(kernel: Callable[..., None], x: Tensor) -> Tensor:
    size = x.shape[-1]
    kernel(IS_HALF[x.dtype], x.data_ptr(), x.data_ptr(), x.numel() // size, size)
    return x


def write_cache(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    rotary: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float] | None,
    num_heads: int,
) -> None:
    """Norms and rotates queries and keys of qkv [rows, heads + 2 · kv_heads, head_dim] in place, and copies
    keys and values to `slots` [rows] int64 of the cache [num_slots, 2 · kv_heads, head_dim].

    rotary: cosines and sines [rows, n] float32, for the first 2 n numbers of a head. norm: weights of queries
    and of keys [head_dim], and epsilon.
    """
    assert kernels is not None
    cos, sin = rotary
    query, key, eps = (norm[0].data_ptr(), norm[1].data_ptr(), norm[2]) if norm else (0, 0, 0.0)
    kernels.write_cache(
        IS_HALF[qkv.dtype], qkv.data_ptr(), cache.data_ptr(), slots.data_ptr(), cos.data_ptr(),
        sin.data_ptr(), query, key, eps, len(qkv), num_heads, cache.shape[1] // 2, qkv.shape[2],
        2 * cos.shape[1],
    )  # fmt: skip


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [rows, heads, head_dim] of a tower's qkv [rows, 3 · heads · head_dim]; queries
    and keys rotated by the tables of `rotary_tables` [rows, 1, head_dim] float32."""
    assert kernels is not None
    rows, dim = len(qkv), cos.shape[-1]
    q, k, v = (qkv.new_empty((rows, num_heads, dim)) for _ in range(3))
    second_half = sin.data_ptr() + dim // 2 * sin.element_size()  # the first one has the sign of the rotation
    kernels.split_rotated(
        IS_HALF[qkv.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr(), qkv.data_ptr(), cos.data_ptr(),
        second_half, dim, rows, num_heads, dim,
    )  # fmt: skip
    return q, k, v


def part_starts(lengths: Tensor) -> Tensor:
    """[rows + 1] int64: the first part of each row, of all rows' parts of `PART` tokens, and their number."""
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(-(-lengths // PART), 0, out=starts[1:])
    return starts


def attend(
    q: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor, block_size: int, scale: float
) -> Tensor:
    """Attention of single tokens, each over its own context in the cache: [rows, heads, head_dim].

    q: [rows, heads, head_dim], the heads of a row side by side; head_dim a multiple of 16. tables: [rows,
    max_blocks] int32, the blocks of each context. lengths: [rows] int32, at least 1. starts: what
    `part_starts` makes of them.
    """
    assert kernels is not None
    rows, heads, dim = q.shape
    size = int(starts[-1]) * heads * (dim + 2) + torch.get_num_threads() * heads * (dim + TILE + 2)
    scratch, out = torch.empty(size, dtype=torch.float32), q.new_empty((rows, heads, dim))
    kernels.attend(
        IS_HALF[q.dtype], out.data_ptr(), q.data_ptr(), cache.data_ptr(), tables.data_ptr(),
        lengths.data_ptr(), scratch.data_ptr(), scale, starts.data_ptr(), rows, q.stride(0), tables.shape[1],
        block_size, heads, cache.shape[1] // 2, dim, PART, torch.get_num_threads(),
    )  # fmt: skip
    return out


def takes_delta(memory: Tensor) -> bool:
    """Whether there is a kernel for states like these [num_slots, heads, key_dim, value_dim]."""
    return takes(memory[0]) and memory.dtype is torch.float32 and memory.shape[3] % LANES == 0


def delta_step(
    memory: Tensor, slots: Tensor, q: Tensor, k: Tensor, v: Tensor, fade: Tensor, share: Tensor
) -> Tensor:
    """One step of the gated delta rule; updates memory[slots] in place, of distinct slots [rows] int64.

    Returns the outputs [rows, heads, value_dim]. q, k: [rows, key_heads, key_dim]. v: [rows, heads,
    value_dim]. fade: [rows, heads], factors of the states. share: [rows, heads]. All float32.
    """
    assert kernels is not None
    out = torch.empty(v.shape)
    parts = [part.contiguous() for part in (q, k, v, fade, share)]
    kernels.delta_step(
        out.data_ptr(), memory.data_ptr(), slots.data_ptr(), *(part.data_ptr() for part in parts), len(slots),
        memory.stride(0), v.shape[1], k.shape[1], k.shape[2], v.shape[2],
    )  # fmt: skip
    return out
