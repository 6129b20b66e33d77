"""The CPU's backend where there are compiled kernels: each token of a short part attends to its own context
in the blocks, in place. Long parts of prompts are computed by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.llm.attention.base import AttentionLayer, AttentionStep, Rotary, SequencePart
from workers.llm.attention.torch import PagedAttention, PromptPart, prefill
from workers.llm.cache.paged_tensors import PagedTensors
from workers.nn.native import operators

# Tokens of a sequence's part that are computed one by one. Each reads the whole context.
FEW = 16


class _Tokens(NamedTuple):
    """Consecutive tokens of a step that are computed one by one."""

    tables: Tensor  # [num_tokens, max_blocks] int32
    lengths: Tensor  # [num_tokens] int32: of each token's context, itself included
    starts: Tensor  # of `operators.part_starts`


class NativeAttention(PagedAttention):
    """`takes` tells whether there are kernels for a cache."""

    @staticmethod
    def takes(cache: PagedTensors) -> bool:
        return all(
            operators.takes(tensor) and tensor.shape[2] % operators.LANES == 0 for tensor in cache.tensors
        )

    def plan(self, spans: Sequence[SequencePart]) -> AttentionStep:
        slots = [self.slots(span) for span in spans]
        new = torch.cat([of_span[span.num_computed :] for of_span, span in zip(slots, spans, strict=True)])
        parts: list[tuple[int, _Tokens | PromptPart]] = []
        few: list[SequencePart] = []
        for span, of_span in zip(spans, slots, strict=True):
            if span.num_tokens <= FEW:
                few.append(span)
                continue
            if few:
                parts.append(self._tokens(few))
                few = []
            parts.append((span.num_tokens, self.prompt_part(of_span, span)))
        if few:
            parts.append(self._tokens(few))
        return _NativeStep(self.cache, new, parts)

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
    parts: Sequence[tuple[int, _Tokens | PromptPart]]  # with their numbers of tokens

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        return angles.cos().contiguous(), angles.sin().contiguous()

    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        if layer.bias is not None:
            qkv += layer.bias.view(qkv.shape[1:])
        cache = self.cache.tensors[layer.index]
        operators.write_cache(qkv, cache, self.new_slots, rotary, layer.norm, layer.num_heads)

    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        cache, start = self.cache.tensors[layer.index], 0
        q, kv = layer.split(qkv)
        attended: list[Tensor] = []
        for count, part in self.parts:
            of_part, start = slice(start, start + count), start + count
            if isinstance(part, PromptPart):
                attended.append(prefill(layer, cache, part, q[of_part], kv[of_part]))
            else:
                size = self.cache.block_size
                attended.append(operators.attend(q[of_part], cache, *part, size, layer.scale))
        return torch.cat(attended) if len(attended) > 1 else attended[0]
