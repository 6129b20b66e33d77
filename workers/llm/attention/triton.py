"""Attention in Triton: the GPU's backend. Runs on the CPU, for tests, under Triton's interpreter.

Decode splits each context over several programs and merges their results (Flash-Decoding, Dao et al. 2023);
the query heads that share a key head are the rows of one tile. Prefill is FlashAttention-2 (Dao 2023), causal
from the bottom right, for chunks behind any history. Both read keys and values through the block table.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from workers.llm.attention.base import AttentionBackend, AttentionLayer, AttentionStep, Rotary, SequencePart
from workers.llm.attention.triton_kernels import (
    decode_kernel,
    merge_kernel,
    norm_rotate_and_write_kernel,
    prefill_kernel,
)
from workers.llm.cache.paged_tensors import PagedTensors
from workers.nn.loader import to_device

DECODE_KEYS = 64
MIN_DOT_ROWS = 16
WIDE_HEAD = 128  # numbers of a head; more take smaller tiles
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2
LOG2_E = 1.4426950408889634  # scales scores: the hardware has exponentials of base 2


class Numbers(NamedTuple):
    """Keys before values of a layer, as kernels are told where they are."""

    numbers: Tensor  # [num_slots, 2 · kv_heads, head_dim]; of e4m3 as bytes
    scales: Tensor  # [num_slots, 2 · kv_heads] float32; of kind 0 any tensor: Triton needs a valid pointer
    kind: int  # KIND of the kernels

    @staticmethod
    def of(cache: PagedTensors, layer: int) -> Numbers:
        tensor, scales = cache.tensors[layer], cache.scales_of(layer)
        if scales is None:
            return Numbers(tensor, tensor, 0)
        is_whole = tensor.dtype is torch.int8
        return Numbers(tensor if is_whole else tensor.view(torch.uint8), scales, 1 if is_whole else 2)


def norm_rotate_and_write(
    layer: AttentionLayer, qkv: Tensor, rotary: Rotary, new_slots: Tensor, cache: Numbers
) -> None:
    """`AttentionStep.write`: queries are left in `qkv`, keys and values in the cache.

    qkv: [num_tokens, heads + 2 · kv_heads, head_dim]. rotary: [num_tokens, n] float32 each.
    new_slots: [num_tokens] int.
    """
    bias, norm, half = layer.bias, layer.norm, layer.head_dim // 2
    numbers, scales, kind = cache
    norm_rotate_and_write_kernel[(len(qkv),)](
        qkv,
        # Triton needs a valid pointer even where it is not read.
        qkv if bias is None else bias,
        qkv if norm is None else norm.query,
        qkv if norm is None else norm.key,
        *rotary, new_slots, numbers, scales, 0.0 if norm is None else norm.eps, qkv.stride(0),
        numbers.stride(0), scales.stride(0),
        layer.num_heads, layer.num_kv_heads, triton.next_power_of_2(qkv.shape[1]),
        half, triton.next_power_of_2(half), rotary[0].shape[1], bias is not None, norm is not None, kind,
        num_warps=choose_num_warps(layer.head_dim),
    )  # fmt: skip


def choose_num_warps(head_dim: int) -> int:
    """Of kernels whose programs have whole heads in registers."""
    return 8 if head_dim > WIDE_HEAD else 4


class PrefillTile(NamedTuple):
    rows: int  # queries of one program
    keys: int  # of one iteration
    num_warps: int


def choose_prefill_tile(capability: int, dtype: torch.dtype, head_dim: int) -> PrefillTile:
    """The largest tile that spills no registers. Hopper (90) and later have more room for accumulators."""
    is_wide = head_dim > WIDE_HEAD
    if dtype == torch.float32:
        return PrefillTile(32, 16 if is_wide else 32, 8)
    if capability >= 90:
        return PrefillTile(128, 32 if is_wide else 64, 8)
    return PrefillTile(64, 32, choose_num_warps(head_dim))


class DecodeTile(NamedTuple):
    keys: int  # of one iteration
    num_warps: int


def choose_decode_tile(dtype: torch.dtype, head_dim: int, kind: int = 0) -> DecodeTile:
    if dtype == torch.float32:
        return DecodeTile(32, 8)
    if kind:  # numbers are widened in registers
        return DecodeTile(DECODE_KEYS // 2, choose_num_warps(head_dim))
    return DecodeTile(DECODE_KEYS, choose_num_warps(head_dim))


def choose_num_splits(num_sequences: int, num_kv_heads: int, num_processors: int, longest: int) -> int:
    """Enough splits that every multiprocessor has a program, but each split with at least a tile of keys.

    A power of two, since each number compiles a kernel of its own.
    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors // max(1, num_sequences * num_kv_heads))
    max_splits = max(1, min(-(-longest // DECODE_KEYS), MAX_SPLITS))
    return 1 << min((wanted - 1).bit_length(), max_splits.bit_length() - 1)


class Layout(NamedTuple):
    """The layout of a step: decodes first, then prefills."""

    num_decodes: int
    num_splits: int
    new_slots: Tensor  # [num_tokens] int32: of the step's keys and values
    tables: Tensor  # [num_sequences, max_blocks] int32
    lengths: Tensor  # [num_sequences] int32
    tiles: Tiles | None  # None: all decode


class Tiles(NamedTuple):
    """The queries of the prefills, divided among programs. All int32."""

    starts: Tensor  # [num_prefills + 1], in the prefills' own tokens
    sequences: Tensor  # [num_tiles]
    offsets: Tensor  # [num_tiles], from the sequence's first new token
    longest: int  # new tokens of a sequence


class TritonAttention(AttentionBackend):
    def __init__(self, cache: PagedTensors) -> None:
        super().__init__(cache)
        self._num_processors, capability = 1, 0
        if cache.device.type == "cuda":
            properties = torch.cuda.get_device_properties(cache.device)
            self._num_processors = properties.multi_processor_count
            capability = 10 * properties.major + properties.minor
        self._tile = choose_prefill_tile(capability, cache.dtype, cache.max_head_dim)

    def plan(self, spans: Sequence[SequencePart]) -> TritonStep:
        """Computed on the host and copied in one piece."""
        device, size = self.cache.device, self.cache.block_size
        num_decodes = sum(1 for _ in itertools.takewhile(lambda span: span.num_tokens == 1, spans))
        lengths = np.array([span.length for span in spans], dtype=np.int32)
        num_blocks = -(-lengths // size)
        tables = np.zeros((len(spans), int(num_blocks.max())), dtype=np.int32)
        for row, span, count in zip(tables, spans, num_blocks.tolist(), strict=True):
            row[:count] = span.block_table[:count]
        new = []
        for row, span in zip(tables, spans, strict=True):
            positions = np.arange(span.num_computed, span.length)
            new.append((row[positions // size] * size + positions % size).astype(np.int32))
        longest = int(lengths[:num_decodes].max(initial=0))
        has_prefills = num_decodes < len(spans)
        tiles = self._tiles([span.num_tokens for span in spans[num_decodes:]]) if has_prefills else None
        num_splits = self._num_splits(num_decodes, longest)
        new_slots = to_device(np.concatenate(new), device)
        return self.step(
            Layout(
                num_decodes,
                num_splits,
                new_slots,
                to_device(tables, device),
                to_device(lengths, device),
                tiles,
            )
        )

    def plan_decode(self, new_slots: Tensor, tables: Tensor, lengths: Tensor, longest: int) -> TritonStep:
        num_splits = self._num_splits(len(lengths), longest)
        return self.step(Layout(len(lengths), num_splits, new_slots, tables, lengths, None))

    def step(self, layout: Layout) -> TritonStep:
        return TritonStep(self.cache, layout, self._tile)

    def warm_up(self, layers: Sequence[AttentionLayer]) -> None:
        """Runs prefill, and decode with each number of splits, once for each distinct shape of layer."""
        spare = [self.cache.spare_slot // self.cache.block_size]
        distinct = {
            (
                layer.num_heads,
                layer.num_kv_heads,
                layer.head_dim,
                layer.bias is None,
                layer.norm is None,
            ): layer
            for layer in layers
        }
        prefill = self.plan([SequencePart(2, 0, 2 * spare)])
        decode = self.plan([SequencePart(1, 0, spare)]).layout
        steps = [decode._replace(num_splits=1 << power) for power in range(MAX_SPLITS.bit_length())]
        for layer in distinct.values():
            _warm_up(prefill, layer, 2)
            for layout in steps:
                _warm_up(self.step(layout), layer, 1)

    def _tiles(self, counts: Sequence[int]) -> Tiles:
        rows, device = self._tile.rows, self.cache.device
        tiles = [(number, offset) for number, count in enumerate(counts) for offset in range(0, count, rows)]
        parts = (np.cumsum([0, *counts]), *np.array(tiles).T)
        arrays = [np.ascontiguousarray(part, dtype=np.int32) for part in parts]
        starts, sequences, offsets = (to_device(array, device) for array in arrays)
        return Tiles(starts, sequences, offsets, max(counts))

    def _num_splits(self, num_sequences: int, longest: int) -> int:
        """One number for all layers: the one for the layer with the fewest programs."""
        return choose_num_splits(num_sequences, self.cache.min_kv_heads, self._num_processors, longest)


def _warm_up(step: TritonStep, layer: AttentionLayer, num_tokens: int) -> None:
    cache = step.cache
    all_heads = layer.num_heads + 2 * layer.num_kv_heads
    qkv = torch.zeros(num_tokens, all_heads, layer.head_dim, dtype=cache.dtype, device=cache.device)
    rotary = step.rotary(torch.zeros(num_tokens, layer.head_dim // 2, device=cache.device), cache.dtype)
    step.write(layer, qkv, rotary)
    step.attend(layer, qkv)


@dataclass(frozen=True, slots=True)
class TritonStep(AttentionStep):
    cache: PagedTensors
    layout: Layout
    tile: PrefillTile

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        """Cosines and sines [num_tokens, n] float32, whatever the type of the activations."""
        angles = angles.contiguous()
        return angles.cos(), angles.sin()

    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        norm_rotate_and_write(layer, qkv, rotary, self.layout.new_slots, Numbers.of(self.cache, layer.index))

    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        num_decodes, tiles = self.layout.num_decodes, self.layout.tiles
        q, _ = layer.split(qkv)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if num_decodes:
            self.decode(layer, q[:num_decodes], out[:num_decodes])
        if tiles is not None:
            self.prefill(layer, tiles, q[num_decodes:], out[num_decodes:])
        return out

    def decode(self, layer: AttentionLayer, q: Tensor, out: Tensor) -> None:
        """Fills `out` for sequences with one new token."""
        layout, splits = self.layout, self.layout.num_splits
        numbers, scales, kind = Numbers.of(self.cache, layer.index)
        num_sequences, num_heads, dim = q.shape
        group, padded = num_heads // layer.num_kv_heads, triton.next_power_of_2(dim)
        tile = choose_decode_tile(q.dtype, dim, kind)
        parts, sums = out, out
        if splits > 1:
            shape = (num_sequences, splits, num_heads)
            parts = torch.empty(*shape, dim, dtype=torch.float32, device=q.device)
            sums = torch.empty(shape, dtype=torch.float32, device=q.device)
        decode_kernel[(num_sequences, layer.num_kv_heads, splits)](
            q, numbers, scales, layout.tables, layout.lengths, parts, sums, layer.scale * LOG2_E,
            q.stride(0), numbers.stride(0), scales.stride(0), layout.tables.stride(0), parts.stride(0),
            parts.stride(1) if splits > 1 else 0,
            layer.num_kv_heads, group, max(MIN_DOT_ROWS, triton.next_power_of_2(group)), dim, padded,
            self.cache.block_size, tile.keys, splits, _precision(q.dtype), kind, num_warps=tile.num_warps,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[(num_sequences, num_heads)](
                parts, sums, out, out.stride(0),
                num_heads, splits, triton.next_power_of_2(splits), dim, padded,
                num_warps=choose_num_warps(dim),
            )  # fmt: skip

    def prefill(self, layer: AttentionLayer, tiles: Tiles, q: Tensor, out: Tensor) -> None:
        """Fills `out` for the sequences behind the decodes."""
        layout, tile = self.layout, self.tile
        numbers, scales, kind = Numbers.of(self.cache, layer.index)
        num_heads, dim = q.shape[1:]
        tables, lengths = layout.tables[layout.num_decodes :], layout.lengths[layout.num_decodes :]
        prefill_kernel[(len(tiles.sequences), num_heads)](
            q, numbers, scales, tables, lengths, tiles.starts, tiles.sequences, tiles.offsets, out,
            layer.scale * LOG2_E,
            q.stride(0), numbers.stride(0), scales.stride(0), tables.stride(0), out.stride(0),
            layer.num_kv_heads, num_heads // layer.num_kv_heads, dim, triton.next_power_of_2(dim),
            self.cache.block_size, tile.rows, tile.keys, _precision(q.dtype), kind, num_warps=tile.num_warps,
        )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
