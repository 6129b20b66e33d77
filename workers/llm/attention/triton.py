"""Attention over a paged KV cache in Triton: the GPU's backend. Runs on the CPU, for tests, under Triton's
interpreter.

Decode splits each context over several programs and merges what they found (Flash-Decoding, Dao et al. 2023);
the query heads that share a key head are the rows of one tile. Prefill is FlashAttention-2 (Dao 2023), causal
from the bottom right, for chunks behind any history. Both find keys and values through the block table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.llm.attention.torch import Span
from workers.nn.loader import to_device

DECODE_KEYS = 64
MIN_DOT_ROWS = 16
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2


@triton.jit
def _slots(table, positions, is_inside, BLOCK_SIZE: tl.constexpr):
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=is_inside, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def _attend(
    q, keys, values, table, positions, is_seen, is_inside, best, total, out, scale, slot_stride,
    BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """One turn of the online softmax, in base 2: q [rows, dim] and the keys at `positions` [tile]."""
    dims = tl.arange(0, DIM_PADDED)
    slots = _slots(table, positions, is_inside, BLOCK_SIZE)
    is_there = is_inside[:, None] & (dims < DIM)[None, :]
    places = slots[:, None] * slot_stride + dims[None, :]
    k = tl.load(keys + places, mask=is_there, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(is_seen, scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    # A row that has seen nothing so far has -inf here: minus itself that would be no number.
    shift = tl.where(new_best == float("-inf"), 0.0, new_best)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(best - shift)
    v = tl.load(values + places, mask=is_there, other=0.0)
    out = out * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return new_best, total * keep + tl.sum(weights, 1), out


@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"])
def decode_kernel(
    q, cache, tables, lengths, out, sums, scale, q_stride, slot_stride, table_stride, out_stride,
    split_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (sequence, kv head, split).

    Writes the split's output, and log2 of its sum of weights (−inf: it saw nothing).
    """
    sequence, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + sequence)
    per_split = tl.cdiv(tl.cdiv(length, TILE), NUM_SPLITS) * TILE
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    heads = kv_head * GROUP + rows
    is_head = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    queries = tl.load(q + sequence * q_stride + heads[:, None] * DIM + dims[None, :], mask=is_head, other=0.0)
    keys = cache + kv_head * DIM
    values = keys + NUM_KV_HEADS * DIM
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for start in range(first, last, TILE):
        positions = start + tl.arange(0, TILE)
        is_inside = positions < last
        best, total, found = _attend(
            queries, keys, values, tables + sequence * table_stride, positions, is_inside[None, :], is_inside,
            best, total, found, scale, slot_stride,
            BLOCK_SIZE, PRECISION, DIM, DIM_PADDED,
        )  # fmt: skip
    sum_or_1 = tl.where(total > 0, total, 1.0)  # a split without keys has seen nothing
    found = found / sum_or_1[:, None]
    places = sequence * out_stride + split * split_stride + heads[:, None] * DIM + dims[None, :]
    tl.store(out + places, found.to(out.dtype.element_ty), mask=is_head)
    if NUM_SPLITS > 1:
        num_heads = NUM_KV_HEADS * GROUP
        tl.store(
            sums + (sequence * NUM_SPLITS + split) * num_heads + heads,
            best + tl.log2(sum_or_1),
            mask=rows < GROUP,
        )


@triton.jit
def merge_kernel(
    parts, sums, out, out_stride,
    NUM_HEADS: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr, DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
):  # fmt: skip
    """Program (sequence, head): the splits' outputs, each by its share of all weights."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS_PADDED), tl.arange(0, DIM_PADDED)
    is_split, is_dim = splits < NUM_SPLITS, dims < DIM
    of_split = (sequence * NUM_SPLITS + splits) * NUM_HEADS + head
    logs = tl.load(sums + of_split, mask=is_split, other=float("-inf"))
    shares = tl.exp2(logs - tl.max(logs, 0))
    found = tl.load(
        parts + of_split[:, None] * DIM + dims[None, :], mask=is_split[:, None] & is_dim[None, :], other=0.0
    )
    merged = tl.sum(found * shares[:, None], 0) / tl.sum(shares, 0)
    tl.store(out + sequence * out_stride + head * DIM + dims, merged.to(out.dtype.element_ty), mask=is_dim)


# What depends on the step must not make a kernel of its own: it would be compiled while streams wait.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["tables", "lengths"])
def prefill_kernel(
    q, cache, tables, lengths, starts, tile_sequences, tile_offsets, out, scale, q_stride, slot_stride,
    table_stride, out_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries of one sequence, head).

    `starts` [num_sequences + 1]: where each sequence's queries begin in q.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence, offset = tl.load(tile_sequences + tile), tl.load(tile_offsets + tile)
    start = tl.load(starts + sequence)
    num_queries = tl.load(starts + sequence + 1) - start
    length = tl.load(lengths + sequence)
    rows, dims = offset + tl.arange(0, ROWS), tl.arange(0, DIM_PADDED)
    is_query = (rows < num_queries)[:, None] & (dims < DIM)[None, :]
    queries = tl.load(
        q + (start + rows)[:, None].to(tl.int64) * q_stride + head * DIM + dims[None, :],
        mask=is_query,
        other=0.0,
    )
    own = length - num_queries + rows  # a query sees up to its own position
    last = tl.minimum(length, length - num_queries + offset + ROWS)
    keys = cache + head // GROUP * DIM
    values = keys + NUM_KV_HEADS * DIM
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    found = tl.zeros([ROWS, DIM_PADDED], tl.float32)
    for first in range(0, last, TILE):
        positions = first + tl.arange(0, TILE)
        is_inside = positions < last
        is_seen = (positions[None, :] <= own[:, None]) & is_inside[None, :]
        best, total, found = _attend(
            queries, keys, values, tables + sequence * table_stride, positions, is_seen, is_inside, best,
            total, found, scale, slot_stride,
            BLOCK_SIZE, PRECISION, DIM, DIM_PADDED,
        )  # fmt: skip
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    places = (start + rows)[:, None].to(tl.int64) * out_stride + head * DIM + dims[None, :]
    tl.store(out + places, found.to(out.dtype.element_ty), mask=is_query)


@triton.jit
def rotate_and_write_kernel(
    qkv, bias, cos, sin, new_slots, cache, qkv_stride, slot_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program (token): adds the bias, turns queries and keys, leaves queries in place, puts keys and values
    into the cache."""
    token = tl.program_id(0).to(tl.int64)
    heads, halves = tl.arange(0, HEADS_PADDED), tl.arange(0, HALF_PADDED)
    is_there = (heads < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & (halves < HALF)[None, :]
    inside = heads[:, None] * (2 * HALF) + halves[None, :]
    first = tl.load(qkv + token * qkv_stride + inside, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(qkv + token * qkv_stride + inside + HALF, mask=is_there, other=0.0).to(tl.float32)
    if HAS_BIAS:
        first += tl.load(bias + inside, mask=is_there, other=0.0).to(tl.float32)
        second += tl.load(bias + inside + HALF, mask=is_there, other=0.0).to(tl.float32)
    c = tl.load(cos + token * HALF + halves, mask=halves < HALF, other=1.0)[None, :]
    s = tl.load(sin + token * HALF + halves, mask=halves < HALF, other=0.0)[None, :]
    is_turned = (heads < NUM_HEADS + NUM_KV_HEADS)[:, None]
    low = tl.where(is_turned, first * c - second * s, first)
    high = tl.where(is_turned, second * c + first * s, second)
    is_query = is_there & (heads < NUM_HEADS)[:, None]
    tl.store(qkv + token * qkv_stride + inside, low.to(qkv.dtype.element_ty), mask=is_query)
    tl.store(qkv + token * qkv_stride + inside + HALF, high.to(qkv.dtype.element_ty), mask=is_query)
    slot = tl.load(new_slots + token).to(tl.int64)
    is_cached = is_there & (heads >= NUM_HEADS)[:, None]
    place = slot * slot_stride + inside - NUM_HEADS * 2 * HALF
    tl.store(cache + place, low.to(cache.dtype.element_ty), mask=is_cached)
    tl.store(cache + place + HALF, high.to(cache.dtype.element_ty), mask=is_cached)


def rotate_and_write(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, new_slots: Tensor, cache: Tensor
) -> None:
    """One layer's qkv [num_tokens, heads + 2 · kv_heads, head_dim], without its bias yet: queries are turned
    in place, keys and values cached.

    cos, sin: [num_tokens, head_dim / 2] float32. new_slots: [num_tokens] int. cache: [num_slots, 2 ·
    kv_heads, head_dim].
    """
    num_kv_heads, dim = cache.shape[1] // 2, cache.shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    rotate_and_write_kernel[(len(qkv),)](
        qkv, qkv if bias is None else bias, cos, sin, new_slots, cache, qkv.stride(0), cache.stride(0),
        num_heads, num_kv_heads, triton.next_power_of_2(qkv.shape[1]), dim // 2,
        triton.next_power_of_2(dim // 2), bias is not None,
    )  # fmt: skip


class PrefillTile(NamedTuple):
    rows: int  # queries of one program
    keys: int  # of one turn
    num_warps: int


def choose_prefill_tile(capability: int, dtype: torch.dtype) -> PrefillTile:
    """The largest that needs no more registers than there are; from Hopper (90) on accumulators lie in more
    of them, or elsewhere."""
    if dtype == torch.float32:
        return PrefillTile(32, 32, 8)
    return PrefillTile(128, 64, 8) if capability >= 90 else PrefillTile(64, 32, 4)


class DecodeTile(NamedTuple):
    keys: int  # of one turn
    num_warps: int


def choose_decode_tile(dtype: torch.dtype) -> DecodeTile:
    return DecodeTile(32, 8) if dtype == torch.float32 else DecodeTile(DECODE_KEYS, 4)


def choose_num_splits(num_sequences: int, num_kv_heads: int, num_processors: int, longest: int) -> int:
    """So many that all processors have programs to run, but none without a tile of keys.

    A power of two: each number is a kernel of its own.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // max(1, num_sequences * num_kv_heads))
    most = max(1, min(-(-longest // DECODE_KEYS), MAX_SPLITS))
    return 1 << min((wanted - 1).bit_length(), most.bit_length() - 1)


class Layout(NamedTuple):
    """Of the sequences in front, which decode, and of those behind them."""

    num_decodes: int
    num_splits: int
    new_slots: Tensor  # [num_tokens] int32: where the step's keys and values go
    tables: Tensor  # [num_sequences, most blocks] int32
    lengths: Tensor  # [num_sequences] int32
    tiles: Tiles | None  # None: all decode


class Tiles(NamedTuple):
    """How the queries of the prefills are divided among programs. All int32."""

    starts: Tensor  # [num_prefills + 1], in the prefills' own tokens
    sequences: Tensor  # [num_tiles]
    offsets: Tensor  # [num_tiles], from the sequence's first new token
    longest: int  # new tokens of a sequence


class TritonAttention:
    """Holds the cache: for each layer keys, then values of each slot: [(num_blocks + 1) · block_size, 2 ·
    kv_heads, head_dim].

    The last block is nobody's: the rows that fill up a batch write to `spare_slot`.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.num_kv_heads, self.head_dim = block_size, num_kv_heads, head_dim
        self.spare_slot = num_blocks * block_size
        shape = (num_layers, self.spare_slot + block_size, 2 * num_kv_heads, head_dim)
        self.cache = torch.empty(shape, dtype=dtype, device=device)  # what was never written is never read
        self._num_processors, capability = 1, 0
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._num_processors, capability = (
                properties.multi_processor_count,
                10 * properties.major + properties.minor,
            )
        self._tile = choose_prefill_tile(capability, dtype)
        self._precision = "ieee" if dtype == torch.float32 else "tf32"
        # log2 e: exponentials of base 2 are what the hardware has
        self._scale = head_dim**-0.5 * 1.4426950408889634

    def plan(self, spans: Sequence[Span]) -> Layout:
        """What all layers of a step need to know, computed once on the host and copied at once."""
        num_decodes = sum(1 for _ in itertools.takewhile(lambda span: span.num_tokens == 1, spans))
        lengths = np.array([span.length for span in spans], dtype=np.int32)
        num_blocks = -(-lengths // self.block_size)
        tables = np.zeros((len(spans), int(num_blocks.max())), dtype=np.int32)
        for row, span, count in zip(tables, spans, num_blocks.tolist(), strict=True):
            row[:count] = span.block_table[:count]
        new = []
        for row, span in zip(tables, spans, strict=True):
            positions = np.arange(span.num_computed, span.length)
            new.append(
                (row[positions // self.block_size] * self.block_size + positions % self.block_size).astype(
                    np.int32
                )
            )
        device = self.cache.device
        longest = int(lengths[:num_decodes].max(initial=0))
        tiles = (
            self._tiles([span.num_tokens for span in spans[num_decodes:]])
            if num_decodes < len(spans)
            else None
        )
        return Layout(
            num_decodes, choose_num_splits(num_decodes, self.num_kv_heads, self._num_processors, longest),
            to_device(np.concatenate(new), device), to_device(tables, device), to_device(lengths, device),
            tiles,
        )  # fmt: skip

    def _tiles(self, counts: Sequence[int]) -> Tiles:
        tiles = [
            (number, offset)
            for number, count in enumerate(counts)
            for offset in range(0, count, self._tile.rows)
        ]
        parts = (np.cumsum([0, *counts]), *np.array(tiles).T)
        starts, sequences, offsets = (
            to_device(np.ascontiguousarray(part, dtype=np.int32), self.cache.device) for part in parts
        )
        return Tiles(starts, sequences, offsets, max(counts))

    def plan_decode(self, new_slots: Tensor, tables: Tensor, lengths: Tensor, longest: int) -> Layout:
        """A step of sequences with one new token each, from tensors on the device, which may change behind
        the plan's back.

        `longest`: no context is longer. As in `Layout`, all are int32.
        """
        num_splits = choose_num_splits(len(lengths), self.num_kv_heads, self._num_processors, longest)
        return Layout(len(lengths), num_splits, new_slots, tables, lengths, None)

    def warm_up(self, num_heads: int) -> None:
        """Compiles what steps will ask for: prefill, and decode with each number of splits.

        Touches the spare block only.
        """
        dtype, device = self.cache.dtype, self.cache.device
        qkv = torch.zeros(2, num_heads + 2 * self.num_kv_heads, self.head_dim, dtype=dtype, device=device)
        rotary = self.rotary(torch.zeros(2, self.head_dim // 2, device=device), dtype)
        spare = [self.spare_slot // self.block_size]
        self(0, self.plan([Span(2, 0, 2 * spare)]), qkv, None, rotary)
        layout = self.plan([Span(1, 0, spare)])
        for power in range(MAX_SPLITS.bit_length()):
            self(0, layout._replace(num_splits=1 << power), qkv[:1], None, (rotary[0][:1], rotary[1][:1]))

    @staticmethod
    def rotary(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of angles [num_tokens, head_dim / 2], for `__call__`: their cosines and sines, float32."""
        angles = angles.contiguous()
        return angles.cos(), angles.sin()

    def __call__(
        self, layer: int, layout: Layout, qkv: Tensor, bias: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Turns queries and keys of qkv [num_tokens, heads + 2 · kv_heads, head_dim], once the bias is on
        them, writes the keys and values, and attends: [num_tokens, heads, head_dim].
        """
        cache, num_decodes = self.cache[layer], layout.num_decodes
        rotate_and_write(qkv, bias, *rotary, layout.new_slots, cache)
        q = qkv[:, : -2 * self.num_kv_heads]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if num_decodes:
            self._decode(cache, layout, q[:num_decodes], out[:num_decodes])
        if layout.tiles is not None:
            self._prefill(cache, layout, layout.tiles, q[num_decodes:], out[num_decodes:])
        return out

    def _decode(self, cache: Tensor, layout: Layout, q: Tensor, out: Tensor) -> None:
        num_sequences, num_heads, dim = q.shape
        group, splits, padded = num_heads // self.num_kv_heads, layout.num_splits, triton.next_power_of_2(dim)
        tile = choose_decode_tile(q.dtype)
        parts, sums = out, out
        if splits > 1:
            parts = torch.empty(num_sequences, splits, num_heads, dim, dtype=torch.float32, device=q.device)
            sums = torch.empty(num_sequences, splits, num_heads, dtype=torch.float32, device=q.device)
        decode_kernel[(num_sequences, self.num_kv_heads, splits)](
            q, cache, layout.tables, layout.lengths, parts, sums, self._scale,
            q.stride(0), cache.stride(0), layout.tables.stride(0), parts.stride(0),
            parts.stride(1) if splits > 1 else 0,
            self.num_kv_heads, group, max(MIN_DOT_ROWS, triton.next_power_of_2(group)), dim, padded,
            self.block_size, tile.keys, splits, self._precision, num_warps=tile.num_warps,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(num_sequences, num_heads)](
                parts, sums, out, out.stride(0), num_heads, splits, triton.next_power_of_2(splits), dim,
                padded
            )  # fmt: skip

    def _prefill(self, cache: Tensor, layout: Layout, tiles: Tiles, q: Tensor, out: Tensor) -> None:
        num_heads, dim = q.shape[1:]
        tables, lengths = layout.tables[layout.num_decodes :], layout.lengths[layout.num_decodes :]
        prefill_kernel[(len(tiles.sequences), num_heads)](
            q, cache, tables, lengths, tiles.starts, tiles.sequences, tiles.offsets, out, self._scale,
            q.stride(0), cache.stride(0), tables.stride(0), out.stride(0),
            self.num_kv_heads, num_heads // self.num_kv_heads, dim, triton.next_power_of_2(dim),
            self.block_size, self._tile.rows, self._tile.keys, self._precision,
            num_warps=self._tile.num_warps,
        )  # fmt: skip
