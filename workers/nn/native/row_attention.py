"""Attention of many rows at the rate of matrix products, on CPUs that multiply in bfloat16.

Where `takes` says no, torch's fused attention takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.nn.native import operators

KEYS = 256  # keys are packed in blocks of so many
PACKED_BYTES = 24 << 20  # at most, for packed keys and values: if one head needs no more
UNITS = 4  # heads for each thread, with which each thread can have heads of its own


class RowSegment(NamedTuple):
    """Rows that attend to keys of their own."""

    first_row: int  # in q and in the result
    first_key: int  # or the first of its blocks in a table
    num_rows: int
    num_keys: int


class RowSegments(NamedTuple):
    """One after the other, for one call of the kernel at a time: it writes into the table."""

    table: Tensor  # [segments + 1, 7] int64, as in kernels.h
    num_packed: int  # keys of all segments, each rounded up to blocks
    longest: int  # the most of one of them

    @staticmethod
    def of(segments: Sequence[RowSegment]) -> RowSegments:
        table = torch.zeros(len(segments) + 1, 7, dtype=torch.int64)
        table[:-1, :5] = torch.tensor([(one.first_row, *one) for one in segments])
        packed = [-(-one.num_keys // KEYS) * KEYS for one in segments]
        return RowSegments(table, sum(packed), max(packed))


class KeyBlocks(NamedTuple):
    """Where keys lie that are not in the order of their rows."""

    table: Tensor  # int32: of all segments
    size: int


def takes(*tensors: Tensor) -> bool:
    """Whether there is a kernel for tensors like these, whose last axis is that of the numbers of a head."""
    kernels = operators.kernels
    if kernels is None or not kernels.attend_rows_scratch(1):
        return False
    return all(
        type(x) is Tensor and x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1
        for x in tensors
    )


def attend(
    q: Tensor, keys: Tensor, values: Tensor, out: Tensor, segments: RowSegments, scale: float,
    *, blocks: KeyBlocks | None = None, is_causal: bool = False,
) -> None:  # fmt: skip
    """Writes what rows of q attend to into out, both [rows, heads, head_dim].

    keys, values: [rows, kv_heads, head_dim], with the same strides. With `is_causal` the last row of a
    segment sees all its keys, each row before it one key less.
    """
    kernels = operators.kernels
    num_threads, dim, num_kv_heads = torch.get_num_threads(), q.shape[2], keys.shape[1]
    of_key = 4 * (-(-dim // 32) * 32)  # bytes of a key and its value, packed
    num_units = (len(segments.table) - 1) * num_kv_heads
    if num_units >= UNITS * num_threads and num_threads * segments.longest * of_key <= PACKED_BYTES:
        heads_at_once, packed = 0, num_threads * segments.longest * of_key
    else:
        heads_at_once = min(num_kv_heads, max(1, PACKED_BYTES // (segments.num_packed * of_key)))
        packed = heads_at_once * segments.num_packed * of_key
    size = num_threads * kernels.attend_rows_scratch(dim)
    scratch = torch.empty(size + packed + 64, dtype=torch.uint8)
    start = scratch.data_ptr() + -scratch.data_ptr() % 64
    kernels.attend_rows(
        out.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr(),
        0 if blocks is None else blocks.table.data_ptr(), segments.table.data_ptr(), start, start + size,
        scale, len(segments.table) - 1, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        keys.stride(0), keys.stride(1), 1 if blocks is None else blocks.size, q.shape[1], num_kv_heads, dim,
        heads_at_once, segments.longest * of_key // 2, num_threads, int(is_causal),
    )  # fmt: skip


def attend_within(q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> bool:
    """Attention [segments, heads, num_rows, head_dim] within each segment, written into out, which has the
    shape of q. False if there is no kernel for such tensors: then nothing is written.

    Rows of q and out may be fewer than those of keys and values.
    """
    if not takes(q, keys, values, out) or keys.stride() != values.stride():
        return False
    num_segments, _, num_rows, _ = q.shape
    strides = [x.stride() for x in (q, out, keys)]
    if num_segments > 1 and any(of_segment % of_row for of_segment, _, of_row, _ in strides):
        return False
    table = torch.zeros(num_segments + 1, 7, dtype=torch.int64)
    places = [of_segment // of_row for of_segment, _, of_row, _ in strides]
    table[:, :3] = torch.arange(num_segments + 1)[:, None] * torch.tensor(places)
    table[:-1, 3], table[:-1, 4] = num_rows, keys.shape[2]
    packed = -(-keys.shape[2] // KEYS) * KEYS
    segments = RowSegments(table, num_segments * packed, packed)
    q, keys, values, out = (x[0].transpose(0, 1) for x in (q, keys, values, out))
    attend(q, keys, values, out, segments, q.shape[-1] ** -0.5)
    return True
