"""Attention over a paged KV cache in plain torch: the CPU's backend, and the reference for every other.

Decode folds the query heads of a group into rows of one matmul: a single query through torch's fused attention is many times
slower on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """One sequence's part of a step: `num_tokens` new tokens behind `num_computed` cached ones."""

    num_tokens: int
    num_computed: int
    block_table: Tensor  # [num_blocks] int64


class _Layout(NamedTuple):
    spans: Sequence[Span]
    new_slots: Tensor  # [num_tokens] int64: where the step's keys and values go
    context_slots: Sequence[Tensor]  # for each sequence [num_computed + num_tokens] int64


class PagedAttention:
    """Holds the cache: for each layer keys and values [num_blocks · block_size, kv_heads, head_dim]."""

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.block_size, self.scale = block_size, head_dim**-0.5
        shape = (num_layers, 2, num_blocks * block_size, num_kv_heads, head_dim)
        self.cache = torch.empty(shape, dtype=dtype, device=device)  # what was never written is never read

    def plan(self, spans: Sequence[Span]) -> _Layout:
        """What all layers of a step need to know, computed once."""
        context = [self._slots(span) for span in spans]
        new = [slots[span.num_computed :] for slots, span in zip(context, spans, strict=True)]
        return _Layout(spans, torch.cat(new), context)

    def _slots(self, span: Span) -> Tensor:
        length = span.num_computed + span.num_tokens
        offsets = torch.arange(self.block_size, device=span.block_table.device)
        return (span.block_table[:, None] * self.block_size + offsets).flatten()[:length]

    def __call__(self, layer: int, layout: _Layout, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes the step's keys and values and attends: q [num_tokens, heads, head_dim], k and v [num_tokens, kv_heads, head_dim]."""
        keys, values = self.cache[layer]
        keys.index_copy_(0, layout.new_slots, k)
        values.index_copy_(0, layout.new_slots, v)
        parts: list[Tensor] = []
        sizes = [span.num_tokens for span in layout.spans]
        for span, slots, part in zip(layout.spans, layout.context_slots, q.split(sizes), strict=True):
            attend = self._decode if span.num_tokens == 1 else self._prefill
            parts.append(attend(part, keys.index_select(0, slots), values.index_select(0, slots)))
        return torch.cat(parts)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_kv_heads = k.shape[1]
        folded = q.view(num_kv_heads, -1, q.shape[-1])  # [kv_heads, group, head_dim]
        scores = torch.matmul(folded, k.permute(1, 2, 0)) * self.scale  # [kv_heads, group, context]
        weights = scores.float().softmax(dim=-1).to(v.dtype)
        return torch.matmul(weights, v.transpose(0, 1)).view(1, -1, q.shape[-1])

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_tokens, length, group = len(q), len(k), q.shape[1] // k.shape[1]
        k, v = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))  # [heads, context, head_dim]
        mask = None
        if num_tokens < length:  # causal, aligned to the bottom right
            mask = torch.ones(num_tokens, length, dtype=torch.bool, device=q.device).tril(length - num_tokens)
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=mask is None, scale=self.scale)
        return out[0].transpose(0, 1)
