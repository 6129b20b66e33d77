"""Attention over a paged KV cache in plain torch: the CPU's backend, and the reference for every other.

Decode folds the query heads of a group into the rows of one query: torch's fused attention is many times
slower on a CPU with one row and `enable_gqa`. There a long history is read in place where its blocks lie side
by side; short ones are gathered and padded, since many small operations would cost more than the copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.wire.messages import Int32Array
from workers.nn.layers import rotary_tables, rotate
from workers.nn.loader import to_device

# of one sequence in one layer: copying it costs about as much as computing it by itself
SMALL_HISTORY_BYTES = 256 << 10


class Span(NamedTuple):
    """One sequence's part of a step: `num_tokens` new tokens behind `num_computed` cached ones."""

    num_tokens: int
    num_computed: int
    block_table: Sequence[int] | Int32Array

    @property
    def length(self) -> int:
        return self.num_computed + self.num_tokens


class _History(NamedTuple):
    """Where a sequence's tokens lie: its longest run of slots, and all others (attention does not mind the
    order)."""

    run: slice
    rest: Tensor | None  # [n] int64


class _Chunk(NamedTuple):
    """New tokens that attend to one another, and to a history in its order."""

    history: slice | Tensor | None  # slots, the new tokens' included; None: there is no history
    mask: Tensor | None  # [num_tokens, context] bool


class _Together(NamedTuple):
    """Decodes that are computed as one batch."""

    slots: Tensor  # [num_sequences · longest] int64; behind the end of a sequence its last
    mask: Tensor  # [num_sequences, 1, 1, longest], 0 or -inf


class _Layout(NamedTuple):
    spans: Sequence[Span]
    new_slots: Tensor  # [num_tokens] int64: where the step's keys and values go
    together: _Together | None  # of the decodes in front
    others: Sequence[_History | _Chunk]  # of the spans behind them: one token, or several


class PagedAttention:
    """Holds the cache: for each layer keys, then values of each slot: [num_blocks · block_size, 2 · kv_heads,
    head_dim]."""

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
        self.block_size, self.num_kv_heads, self.scale = block_size, num_kv_heads, head_dim**-0.5
        shape = (num_layers, num_blocks * block_size, 2 * num_kv_heads, head_dim)
        self._is_cpu = device.type == "cpu"
        self.cache = torch.empty(shape, dtype=dtype, device=device)  # what was never written is never read

    def plan(self, spans: Sequence[Span]) -> _Layout:
        """What all layers of a step need to know, computed once."""
        slots = [self._slots(span) for span in spans]
        new = torch.cat([of_span[span.num_computed :] for of_span, span in zip(slots, spans, strict=True)])
        num_decodes = sum(1 for _ in itertools.takewhile(lambda span: span.num_tokens == 1, spans))
        longest = max((span.length for span in spans[:num_decodes]), default=0)
        if self._is_cpu and (num_decodes < 2 or longest * self.cache[0, 0].nbytes > SMALL_HISTORY_BYTES):
            num_decodes = 0
        together = self._together(slots[:num_decodes], longest) if num_decodes else None
        others = [self._other(*pair) for pair in zip(slots[num_decodes:], spans[num_decodes:], strict=True)]
        return _Layout(spans, new, together, others)

    def _slots(self, span: Span) -> Tensor:
        table = np.asarray(span.block_table)[: -(-span.length // self.block_size)].astype(np.int64)
        return to_device(
            (table[:, None] * self.block_size + np.arange(self.block_size)).ravel()[: span.length],
            self.cache.device,
        )

    def _together(self, slots: Sequence[Tensor], longest: int) -> _Together:
        # Padded with slots of its own: what another's hold, should it not be finite, would pass even a weight
        # of zero.
        padded = torch.stack(
            [torch.cat((of_span, of_span[-1:].expand(longest - len(of_span)))) for of_span in slots]
        )
        lengths = to_device(np.array([len(of_span) for of_span in slots]), padded.device)
        is_outside = torch.arange(longest, device=padded.device) >= lengths[:, None]
        mask = torch.zeros(padded.shape, dtype=self.cache.dtype, device=padded.device).masked_fill_(
            is_outside, -torch.inf
        )
        return _Together(padded.flatten(), mask[:, None, None])

    def _other(self, slots: Tensor, span: Span) -> _History | _Chunk:
        if not span.num_computed:
            return _Chunk(None, None)
        history = self._history(slots, span)
        if span.num_tokens == 1 and self._is_cpu:
            return history
        # Causal, aligned to the bottom right.
        mask = torch.ones(span.num_tokens, span.length, dtype=torch.bool, device=slots.device).tril(
            span.num_computed
        )
        return _Chunk(history.run if history.rest is None else slots, mask)

    def _history(self, slots: Tensor, span: Span) -> _History:
        size, table = self.block_size, np.asarray(span.block_table)[: -(-span.length // self.block_size)]
        ends = (np.flatnonzero(np.diff(table) != 1) + 1).tolist()
        first, last = max(itertools.pairwise([0, *ends, len(table)]), key=lambda run: run[1] - run[0])
        start, stop = first * size, min(last * size, span.length)  # positions of the longest run
        rest = torch.cat((slots[:start], slots[stop:]))
        slot = int(table[first]) * size
        return _History(slice(slot, slot + stop - start), rest if len(rest) else None)

    @staticmethod
    def rotary(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of angles [num_tokens, head_dim / 2], for `__call__`."""
        return rotary_tables(angles, dtype)

    def __call__(
        self, layer: int, layout: _Layout, qkv: Tensor, bias: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Turns queries and keys of qkv [num_tokens, heads + 2 · kv_heads, head_dim], once the bias is on
        them, writes the keys and values, and attends: [num_tokens, heads, head_dim].
        """
        if bias is not None:
            qkv += bias.view(qkv.shape[1:])
        turned = qkv[:, : -self.num_kv_heads]  # queries and keys at once
        turned.copy_(rotate(turned, *rotary))
        q, kv = qkv[:, : -2 * self.num_kv_heads], qkv[:, -2 * self.num_kv_heads :]
        cache = self.cache[layer]
        cache.index_copy_(0, layout.new_slots, kv)
        parts: list[Tensor] = []
        start = 0
        if layout.together is not None:
            start = len(layout.spans) - len(layout.others)
            parts.append(self._decode_together(cache, layout.together, q[:start]))
        for span, other in zip(layout.spans[start:], layout.others, strict=True):
            part, start = slice(start, start + span.num_tokens), start + span.num_tokens
            parts.append(
                self._decode(cache, other, q[part])
                if isinstance(other, _History)
                else self._prefill(cache, other, q[part], kv[part])
            )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode_together(self, cache: Tensor, together: _Together, q: Tensor) -> Tensor:
        num_sequences, (_, num_heads, dim) = len(together.mask), q.shape
        rows = cache.index_select(0, together.slots).view(num_sequences, -1, 2, self.num_kv_heads, dim)
        keys, values = rows.transpose(1, 3).unbind(2)  # [sequences, kv_heads, longest, head_dim]
        folded = q.view(num_sequences, self.num_kv_heads, -1, dim)
        return F.scaled_dot_product_attention(folded, keys, values, together.mask, scale=self.scale).view(
            num_sequences, num_heads, dim
        )

    def _decode(self, cache: Tensor, history: _History, q: Tensor) -> Tensor:
        out, log_sum = self._attend(q, cache[history.run])
        if history.rest is not None:
            of_rest, log_sum_of_rest = self._attend(q, cache.index_select(0, history.rest))
            out = torch.lerp(
                out, of_rest.to(out.dtype), torch.sigmoid(log_sum_of_rest - log_sum)[..., None].to(out.dtype)
            )
        return out.reshape(1, -1, q.shape[-1])

    def _attend(self, q: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Output [1, kv_heads, group, head_dim] of one token over these rows of the cache, and the logarithm
        of what its softmax divides by."""
        # [1, kv_heads, context, head_dim]
        keys, values = rows.transpose(0, 1)[None].split(self.num_kv_heads, dim=1)
        folded = q.view(1, self.num_kv_heads, -1, q.shape[-1])
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            folded, keys, values, scale=self.scale
        )
        return out, log_sum

    def _prefill(self, cache: Tensor, chunk: _Chunk, q: Tensor, kv: Tensor) -> Tensor:
        if chunk.history is not None:
            kv = cache[chunk.history]
        # [1, kv_heads, context, head_dim]
        keys, values = kv.transpose(0, 1)[None].split(self.num_kv_heads, dim=1)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, chunk.mask, is_causal=chunk.mask is None, scale=self.scale,
            enable_gqa=True
        )  # fmt: skip
        return out[0].transpose(0, 1)
