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
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
INTERFACE = 10  # of module.cpp
kernels: Any = None
with contextlib.suppress(ImportError):
    kernels = importlib.import_module("workers.nn.native._kernels")
    if getattr(kernels, "INTERFACE", 0) != INTERFACE:
        logger.warning("the compiled kernels are of another version: run python setup.py build_ext --inplace")
        kernels = None

LANES = 16  # floats of a vector
TILE = 64  # tokens whose scores a thread has at once
DELTA_TAPS = 4  # of a convolution before the delta rule
PART = 256  # tokens of a context that one thread attends to at a time
IS_HALF = {torch.float32: 0, torch.bfloat16: 1}
KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}  # of caches; 0: in the type of queries


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
    """x / rms(x) · weight over the last dimension. x must not be empty. The weight is of its type, or in
    float32."""
    assert kernels is not None
    out, size = torch.empty_like(x), x.shape[-1]
    kernels.rms_norm(
        IS_HALF[x.dtype], out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.numel() // size, size, eps,
        int(weight.dtype is torch.float32),
    )  # fmt: skip
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
    scales: Tensor | None = None,
) -> None:
    """Norms and rotates queries and keys of qkv [rows, heads + 2 · kv_heads, head_dim] in place, and writes
    keys and values to `slots` [rows] int64 of the cache [num_slots, 2 · kv_heads, head_dim].

    The cache is in the type of qkv, or in 8 bits; then head_dim is a multiple of 16, and `scales` [num_slots,
    2 · kv_heads] float32 gets the scale of each head.
    rotary: cosines and sines [rows, n] float32, for the first 2 n numbers of a head. norm: weights of queries
    and of keys [head_dim], both of the type of qkv or in float32, and epsilon.
    """
    assert kernels is not None
    cos, sin = rotary
    query, key, eps = (norm[0].data_ptr(), norm[1].data_ptr(), norm[2]) if norm else (0, 0, 0.0)
    is_wide = norm is not None and norm[0].dtype is torch.float32
    kernels.write_cache(
        IS_HALF[qkv.dtype], qkv.data_ptr(), cache.data_ptr(), 0 if scales is None else scales.data_ptr(),
        slots.data_ptr(), cos.data_ptr(), sin.data_ptr(), query, key, eps, len(qkv), num_heads,
        cache.shape[1] // 2, qkv.shape[2], 2 * cos.shape[1], int(is_wide), KINDS.get(cache.dtype, 0),
    )  # fmt: skip


def read_cache(cache: Tensor, scales: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys before values of these slots [n] int64 of a cache in 8 bits, as `write_cache` has written them, in
    this type: [n, 2 · kv_heads, head_dim]."""
    assert kernels is not None
    out = torch.empty(len(slots), *cache.shape[1:], dtype=dtype)
    kernels.read_cache(
        IS_HALF[dtype], out.data_ptr(), cache.data_ptr(), scales.data_ptr(), slots.data_ptr(), *out.shape,
        KINDS[cache.dtype],
    )  # fmt: skip
    return out


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
    q: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor, starts: Tensor, block_size: int, scale: float,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of single tokens, each over its own context in the cache: [rows, heads, head_dim].

    q: [rows, heads, head_dim], the heads of a row side by side; head_dim a multiple of 16. tables: [rows,
    max_blocks] int32, the blocks of each context. lengths: [rows] int32, at least 1. starts: what
    `part_starts` makes of them. cache and scales: as of `write_cache`.
    """
    assert kernels is not None
    rows, heads, dim = q.shape
    of_thread = heads * (dim + TILE + 2) + cache.shape[1] * TILE
    size = int(starts[-1]) * heads * (dim + 2) + torch.get_num_threads() * of_thread
    scratch, out = torch.empty(size, dtype=torch.float32), q.new_empty((rows, heads, dim))
    kernels.attend(
        IS_HALF[q.dtype], out.data_ptr(), q.data_ptr(), cache.data_ptr(),
        0 if scales is None else scales.data_ptr(), tables.data_ptr(), lengths.data_ptr(),
        scratch.data_ptr(), scale, starts.data_ptr(), rows, q.stride(0), tables.shape[1], block_size, heads,
        cache.shape[1] // 2, dim, PART, torch.get_num_threads(), KINDS.get(cache.dtype, 0),
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


class DeltaWeights(NamedTuple):
    """What a layer of Gated DeltaNet is told once (`workers/nn/delta/layer.py`). All float32."""

    taps: Tensor  # [num_taps, channels]
    decay: Tensor  # [heads]
    bias: Tensor  # [heads]
    gain: Tensor  # [value_dim]
    eps: float
    num_key_heads: int


class DeltaRows(NamedTuple):
    """Of some tokens, as such a layer gets them."""

    x: Tensor  # [n, channels]
    z: Tensor  # [n, heads · value_dim]
    b: Tensor  # [n, heads]
    a: Tensor  # [n, heads]
    out: Tensor  # [n, heads · value_dim], to be filled

    def part(self, part: slice) -> DeltaRows:
        return DeltaRows(*(tensor[part] for tensor in self))


def takes_delta_net(rows: DeltaRows, inputs: Tensor, memory: Tensor, num_taps: int) -> bool:
    """Whether there is a kernel for tensors of such types, and for such states."""
    return (
        takes_delta(memory)
        and inputs.dtype in IS_HALF
        and all(type(x) is Tensor and x.dtype is inputs.dtype and x.stride(1) == 1 for x in rows)
        and rows.b.stride() == rows.a.stride()
        and memory.shape[2] % LANES == 0
        and num_taps == DELTA_TAPS
    )


class DeltaSequences(NamedTuple):
    """Which tokens a layer of Gated DeltaNet gets, and where their states are. All int64, on the CPU."""

    # [num_sequences, 5]: of each sequence its slot, its first row, its tokens, the tokens before them, and
    # the first of its `targets`; -1: the state behind its tokens goes to the slot.
    table: Tensor
    targets: Tensor | None = None  # [n]: rows of the states behind each token


def delta_net(
    rows: DeltaRows, inputs: Tensor, memory: Tensor, sequences: DeltaSequences, weights: DeltaWeights
) -> None:
    """Sequences through what stands between the projections of a layer of Gated DeltaNet, for tensors that
    `takes_delta_net` takes. Updates the states of the sequences, and fills `rows.out`, which is contiguous.

    inputs: [num_rows, num_taps - 1, channels]. memory: [num_rows, heads, key_dim, value_dim].
    """
    assert kernels is not None
    x, z, b, a, out = rows
    _, num_heads, key_dim, value_dim = memory.shape
    num_threads, size = torch.get_num_threads(), kernels.delta_net_scratch(key_dim, value_dim)
    scratch = torch.empty(num_threads * size + 64, dtype=torch.uint8)
    kernels.delta_net(
        IS_HALF[x.dtype], out.data_ptr(), x.data_ptr(), z.data_ptr(), b.data_ptr(), a.data_ptr(),
        weights.taps.data_ptr(), weights.decay.data_ptr(), weights.bias.data_ptr(), weights.gain.data_ptr(),
        inputs.data_ptr(), memory.data_ptr(), sequences.table.data_ptr(),
        0 if sequences.targets is None else sequences.targets.data_ptr(),
        scratch.data_ptr() + -scratch.data_ptr() % 64, weights.eps, len(sequences.table), x.stride(0),
        z.stride(0), b.stride(0), inputs.stride(0), memory.stride(0), x.shape[1], num_heads,
        weights.num_key_heads, key_dim, value_dim, num_threads,
    )  # fmt: skip
