"""Attention in plain torch: the CPU's backend, and the reference for every other.

Decode folds the query heads of a group into the rows of one query: on a CPU torch's fused attention is many
times slower with one row and `enable_gqa`, and up to four times with the few rows of a decode with drafts. A
decode reads adjacent blocks of a long history in place; short histories are gathered and padded, since many
small operations would cost more than the copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.attention.base import AttentionBackend, AttentionLayer, AttentionStep, Rotary, SequencePart
from workers.llm.cache.paged_tensors import PagedTensors
from workers.nn.layers import rotary_tables, rotate
from workers.nn.loader import to_device

# Of one sequence in one layer: copying so much costs about as much as a separate attention call.
SMALL_HISTORY_BYTES = 256 << 10
FEW_TOKENS = 16  # of a chunk behind a history: with more, folding gains nothing


class _History(NamedTuple):
    """The slots of a sequence: its longest run, and the rest. Attention does not depend on their order."""

    run: slice
    rest: Tensor | None  # [n] int64


class PromptPart(NamedTuple):
    """New tokens that attend to one another and to a history, in order."""

    history: slice | Tensor | None  # slots, the new tokens' included; None: only these are attended to
    mask: Tensor | None  # [num_tokens, context] bool; of a folded chunk 0 or -inf; None: there is no history
    is_folded: bool = False


class _Together(NamedTuple):
    """Decodes that are computed as one batch."""

    slots: Tensor  # [num_sequences · longest] int64, padded with the sequence's last slot
    mask: Tensor  # [num_sequences, 1, 1, longest], 0 or -inf


class _Layout(NamedTuple):
    counts: Sequence[int]  # new tokens of each sequence
    new_slots: Tensor  # [num_tokens] int64: of the step's keys and values
    together: _Together | None  # the leading decodes
    others: Sequence[_History | PromptPart]  # all other sequences: one token, or several


class PagedAttention(AttentionBackend):
    def __init__(self, cache: PagedTensors) -> None:
        super().__init__(cache)
        self._is_cpu = cache.device.type == "cpu"

    def plan(self, spans: Sequence[SequencePart]) -> AttentionStep:
        slots = [self.slots(span) for span in spans]
        new = torch.cat([of_span[span.num_computed :] for of_span, span in zip(slots, spans, strict=True)])
        num_decodes = sum(1 for _ in itertools.takewhile(lambda span: span.num_tokens == 1, spans))
        longest = max((span.length for span in spans[:num_decodes]), default=0)
        if self._is_cpu and (num_decodes < 2 or longest * self.cache.max_slot_bytes > SMALL_HISTORY_BYTES):
            num_decodes = 0
        together = self._gather(slots[:num_decodes], longest) if num_decodes else None
        others = [self._other(*pair) for pair in zip(slots[num_decodes:], spans[num_decodes:], strict=True)]
        return _TorchStep(self.cache, _Layout([span.num_tokens for span in spans], new, together, others))

    def plan_decode(self, new_slots: Tensor, tables: Tensor, lengths: Tensor, longest: int) -> AttentionStep:
        size = self.cache.block_size
        steps = torch.arange(min(longest, tables.shape[1] * size), device=tables.device)
        # A sequence is padded with its last token.
        positions = torch.minimum(steps, lengths[:, None].long() - 1)
        slots = tables.long().gather(1, positions // size) * size + positions % size
        together = _Together(slots.flatten(), self._mask(steps >= lengths[:, None]))
        return _TorchStep(self.cache, _Layout([1] * len(lengths), new_slots.long(), together, ()))

    def warm_up(self, layers: Sequence[AttentionLayer]) -> None:
        """Nothing is compiled."""

    def slots(self, span: SequencePart) -> Tensor:
        size = self.cache.block_size
        table = np.asarray(span.block_table)[: -(-span.length // size)].astype(np.int64)
        slots = (table[:, None] * size + np.arange(size)).ravel()[: span.length]
        return to_device(slots, self.cache.device)

    def _gather(self, slots: Sequence[Tensor], longest: int) -> _Together:
        # Padded with the sequence's own slots: others may hold NaN, which a weight of zero does not mask.
        rows = [torch.cat((of_span, of_span[-1:].expand(longest - len(of_span)))) for of_span in slots]
        padded = torch.stack(rows)
        lengths = to_device(np.array([len(of_span) for of_span in slots]), padded.device)
        is_outside = torch.arange(longest, device=padded.device) >= lengths[:, None]
        return _Together(padded.flatten(), self._mask(is_outside))

    def _mask(self, is_outside: Tensor) -> Tensor:
        """[num_sequences, 1, 1, longest]"""
        mask = torch.zeros(is_outside.shape, dtype=self.cache.dtype, device=is_outside.device)
        return mask.masked_fill_(is_outside, -torch.inf)[:, None, None]

    def _other(self, slots: Tensor, span: SequencePart) -> _History | PromptPart:
        if span.num_computed and span.num_tokens == 1 and self._is_cpu:
            return self._history(slots, span)
        return self.prompt_part(slots, span)

    def prompt_part(self, slots: Tensor, span: SequencePart) -> PromptPart:
        if not span.num_computed:
            # In 8 bits a prompt attends to what the cache has, wherever the prompt is cut.
            return PromptPart(None if self.cache.format is None else slots, None)
        history = self._history(slots, span)
        # Causal, aligned to the bottom right.
        mask = torch.ones(span.num_tokens, span.length, dtype=torch.bool, device=slots.device)
        mask = mask.tril_(span.num_computed)
        is_long = span.length * self.cache.max_slot_bytes > SMALL_HISTORY_BYTES
        is_folded = self._is_cpu and is_long and span.num_tokens <= FEW_TOKENS
        if is_folded:
            mask = self._mask(~mask)[:, 0, 0]
        return PromptPart(history.run if history.rest is None else slots, mask, is_folded)

    def _history(self, slots: Tensor, span: SequencePart) -> _History:
        size = self.cache.block_size
        table = np.asarray(span.block_table)[: -(-span.length // size)]
        ends = (np.flatnonzero(np.diff(table) != 1) + 1).tolist()
        first, last = max(itertools.pairwise([0, *ends, len(table)]), key=lambda run: run[1] - run[0])
        start, stop = first * size, min(last * size, span.length)  # positions of the longest run
        rest = torch.cat((slots[:start], slots[stop:]))
        slot = int(table[first]) * size
        return _History(slice(slot, slot + stop - start), rest if len(rest) else None)


@dataclass(frozen=True, slots=True)
class _TorchStep(AttentionStep):
    cache: PagedTensors
    layout: _Layout

    def rotary(self, angles: Tensor, dtype: torch.dtype) -> Rotary:
        return rotary_tables(angles, dtype)

    def write(self, layer: AttentionLayer, qkv: Tensor, rotary: Rotary) -> None:
        if layer.bias is not None:
            qkv += layer.bias.view(qkv.shape[1:])
        turned = qkv[:, : layer.num_heads + layer.num_kv_heads]  # queries and keys
        if layer.norm is not None:
            both = turned[:, : layer.num_heads], turned[:, layer.num_heads :]
            for of_kind, weight in zip(both, layer.norm[:2], strict=True):
                of_kind.copy_(F.rms_norm(of_kind.to(weight.dtype), weight.shape, weight, layer.norm.eps))
        turned = turned[..., : rotary[0].shape[-1]]  # or the first numbers of each head
        turned.copy_(rotate(turned, *rotary))
        self.cache.write(layer.index, self.layout.new_slots, qkv[:, layer.num_heads :])

    def attend(self, layer: AttentionLayer, qkv: Tensor) -> Tensor:
        cache, counts, others = self.cache, self.layout.counts, self.layout.others
        q, kv = layer.split(qkv)
        parts: list[Tensor] = []
        start = 0
        if self.layout.together is not None:
            start = len(counts) - len(others)
            parts.append(_decode_together(layer, cache, self.layout.together, q[:start]))
        for count, other in zip(counts[start:], others, strict=True):
            part, start = slice(start, start + count), start + count
            if isinstance(other, _History):
                parts.append(_decode(layer, cache, other, q[part]))
            else:
                found = kv[part] if other.history is None else cache.read(layer.index, other.history)
                parts.append(prefill(layer, other, q[part], found))
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def _decode_together(layer: AttentionLayer, cache: PagedTensors, together: _Together, q: Tensor) -> Tensor:
    num_sequences, dim = len(together.mask), layer.head_dim
    rows = cache.read(layer.index, together.slots).view(num_sequences, -1, 2, layer.num_kv_heads, dim)
    keys, values = rows.transpose(1, 3).unbind(2)  # [sequences, kv_heads, longest, head_dim]
    folded = q.view(num_sequences, layer.num_kv_heads, -1, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, together.mask, scale=layer.scale)
    return out.view(num_sequences, layer.num_heads, dim)


def _decode(layer: AttentionLayer, cache: PagedTensors, history: _History, q: Tensor) -> Tensor:
    out, log_sum = _attend_to(layer, q, cache.read(layer.index, history.run))
    if history.rest is not None:
        of_rest, log_sum_of_rest = _attend_to(layer, q, cache.read(layer.index, history.rest))
        share = torch.sigmoid(log_sum_of_rest - log_sum)[..., None].to(out.dtype)
        out = torch.lerp(out, of_rest.to(out.dtype), share)
    return out.reshape(1, layer.num_heads, layer.head_dim)


def _attend_to(layer: AttentionLayer, q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Output [1, kv_heads, group, head_dim] of one token over these rows of the cache, and the logarithm of
    its softmax's denominator."""
    keys, values = rows.transpose(0, 1)[None].split(
        layer.num_kv_heads,
        dim=1,
    )  # [1, kv_heads, context, head_dim]
    folded = q.view(1, layer.num_kv_heads, -1, layer.head_dim)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, log_sum = attend(folded, keys, values, scale=layer.scale)
    return out, log_sum


def prefill(layer: AttentionLayer, chunk: PromptPart, q: Tensor, kv: Tensor) -> Tensor:
    """kv: keys before values of the chunk's history, or of its own tokens."""
    keys, values = kv.transpose(0, 1)[None].split(
        layer.num_kv_heads,
        dim=1,
    )  # [1, kv_heads, context, head_dim]
    if chunk.is_folded:
        return _attend_folded(layer, chunk, q, keys, values)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, chunk.mask,
        is_causal=chunk.mask is None, scale=layer.scale, enable_gqa=True,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _attend_folded(
    layer: AttentionLayer, chunk: PromptPart, q: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    assert chunk.mask is not None
    count, group = len(q), layer.num_heads // layer.num_kv_heads
    of_heads = q.view(count, layer.num_kv_heads, group, layer.head_dim).transpose(0, 1)
    folded = of_heads.reshape(1, layer.num_kv_heads, count * group, layer.head_dim)
    mask = chunk.mask[None, :, None].expand(1, count, group, -1).reshape(1, 1, count * group, -1)
    out = F.scaled_dot_product_attention(folded, keys, values, mask, scale=layer.scale)
    return out.view(layer.num_kv_heads, count, group, -1).transpose(0, 1).reshape(q.shape)
