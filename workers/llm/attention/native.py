"""The CPU's backend where there are compiled kernels: each token of a short part attends to its own context
in the blocks, in place. Long parts of prompts are products of matrices, by a kernel where there is one for
the processor and the type of the cache, else by torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.llm.attention.base import AttentionLayer, AttentionStep, Rotary, SequencePart
from workers.llm.attention.torch import PagedAttention, PromptPart, prefill
from workers.llm.cache.paged_tensors import PagedTensors
from workers.nn.native import operators, row_attention

# Tokens of a sequence's part that are computed one by one. Each reads the whole context.
FEW = 16


class _Tokens(NamedTuple):
    """Consecutive tokens of a step that are computed one by one."""

    tables: Tensor  # [num_tokens, max_blocks] int32
    lengths: Tensor  # [num_tokens] int32: of each token's context, itself included
    starts: Tensor  # of `operators.part_starts`


class _Prompts(NamedTuple):
    """Consecutive long parts of a step."""

    segments: row_attention.RowSegments
    # Where their keys are: in blocks of the cache, or, of a cache in 8 bits, in the slots [n] that are to be
    # read, one context behind the other.
    keys: row_attention.KeyBlocks | Tensor


class NativeAttention(PagedAttention):
    """`takes` tells whether there are kernels for a cache."""

    @staticmethod
    def takes(cache: PagedTensors) -> bool:
        has_kernels = operators.takes(torch.empty(0, dtype=cache.dtype, device=cache.device))
        return has_kernels and all(tensor.shape[2] % operators.LANES == 0 for tensor in cache.tensors)

    def plan(self, spans: Sequence[SequencePart]) -> AttentionStep:
        slots = [self.slots(span) for span in spans]
        new = torch.cat([of_span[span.num_computed :] for of_span, span in zip(slots, spans, strict=True)])
        has_kernel = row_attention.takes(torch.empty(0, dtype=self.cache.dtype))
        parts: list[tuple[int, _Tokens | _Prompts | PromptPart]] = []
        pairs = zip(spans, slots, strict=True)
        for are_few, group in itertools.groupby(pairs, lambda pair: pair[0].num_tokens <= FEW):
            together = list(group)
            if are_few:
                parts.append(self._tokens([span for span, _ in together]))
            elif has_kernel:
                parts.append(self._prompts(together))
            else:
                parts += [(span.num_tokens, self.prompt_part(of_span, span)) for span, of_span in together]
        return _NativeStep(self.cache, new, parts)

    def _prompts(self, parts: Sequence[tuple[SequencePart, Tensor]]) -> tuple[int, _Prompts]:
        """Parts with the slots of their contexts."""
        segments: list[row_attention.RowSegment] = []
        tables: list[npt.NDArray[np.int32]] = []
        has_blocks = self.cache.format is None
        num_tokens = num_keys = 0  # or blocks of keys
        for span, _ in parts:
            segments.append(row_attention.RowSegment(num_tokens, num_keys, span.num_tokens, span.length))
            table = np.asarray(span.block_table, np.int32)[: -(-span.length // self.cache.block_size)]
            tables.append(table)
            num_tokens += span.num_tokens
            num_keys += len(table) if has_blocks else span.length
        of_segments = row_attention.RowSegments.of(segments)
        if not has_blocks:
            return num_tokens, _Prompts(of_segments, torch.cat([slots for _, slots in parts]))
        blocks = row_attention.KeyBlocks(torch.from_numpy(np.concatenate(tables)), self.cache.block_size)
        return num_tokens, _Prompts(of_segments, blocks)

    def _tokens(self, spans: Sequence[SequencePart]) -> tuple[int, _Tokens]:
        counts = [span.num_tokens for span in spans]
        longest = max(span.length for span in spans)
        tables = np.zeros((sum(counts), -(-longest // self.cache.block_size)), np.int32)
        lengths = np.empty(len(tables), np.int32)
        start = 0
        for span in spans:
            stop = start + span.num_tokens
            num_blocks = -(-span.length // self.cache.block_size)
            tables[start:stop, :num_blocks] = span.block_table[:num_blocks]
            lengths[start:stop] = np.arange(span.num_computed + 1, span.length + 1)
            start = stop
        rows, contexts = torch.from_numpy(tables), torch.from_numpy(lengths)
        return start, _Tokens(rows, contexts, operators.part_starts(contexts))


@dataclass(frozen=True, slots=True)
class _NativeStep(AttentionStep):
    cache: PagedTensors
    new_slots: Tensor  # [num_tokens] int64
    parts: Sequence[tuple[int, _Tokens | _Prompts | PromptPart]]  # with their numbers of tokens

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        return angles.cos().contiguous(), angles.sin().contiguous()

    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        if layer.bias is not None:
            qkv += layer.bias.view(qkv.shape[1:])
        tensor, scales = self.cache.tensors[layer.index], self.cache.scales_of(layer.index)
        operators.write_cache(qkv, tensor, self.new_slots, rotary, layer.norm, layer.num_heads, scales)

    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        start = 0
        q, kv = layer.split(qkv)
        attended: list[Tensor] = []
        for count, part in self.parts:
            of_part, start = slice(start, start + count), start + count
            if isinstance(part, PromptPart):
                found = kv[of_part] if part.history is None else _read(self.cache, layer.index, part.history)
                attended.append(prefill(layer, part, q[of_part], found))
            elif isinstance(part, _Prompts):
                attended.append(_attend_prompts(layer, self.cache, part, q[of_part]))
            else:
                attended.append(_attend_tokens(layer, self.cache, part, q[of_part]))
        return torch.cat(attended) if len(attended) > 1 else attended[0]


def _read(cache: PagedTensors, layer: int, slots: slice | Tensor) -> Tensor:
    """`PagedTensors.read`, of a cache in 8 bits by a kernel."""
    if (scales := cache.scales_of(layer)) is None:
        return cache.read(layer, slots)
    places = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
    return operators.read_cache(cache.tensors[layer], scales, places, cache.dtype)


def _attend_tokens(layer: AttentionLayer, cache: PagedTensors, part: _Tokens, q: Tensor) -> Tensor:
    tensor, scales = cache.tensors[layer.index], cache.scales_of(layer.index)
    return operators.attend(q, tensor, *part, cache.block_size, layer.scale, scales)


def _attend_prompts(layer: AttentionLayer, cache: PagedTensors, part: _Prompts, q: Tensor) -> Tensor:
    if isinstance(part.keys, row_attention.KeyBlocks):
        kv, blocks = cache.tensors[layer.index], part.keys
    else:
        kv, blocks = _read(cache, layer.index, part.keys), None
    keys, values = kv.split(layer.num_kv_heads, dim=1)
    out = torch.empty(q.shape, dtype=q.dtype)
    row_attention.attend(q, keys, values, out, part.segments, layer.scale, blocks=blocks, is_causal=True)
    return out
