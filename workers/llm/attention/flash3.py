"""Attention by FlashAttention-3 (Shah et al. 2024), on the cache and with the plans of the Triton backend.

Needs its package, and Hopper. Never run on a GPU so far: tests use a fake package.
"""

from __future__ import annotations

import flash_attn_interface
from torch import Tensor

from workers.llm.attention.base import AttentionLayer
from workers.llm.attention.triton import Layout, Tiles, TritonAttention, TritonStep


class Flash3Attention(TritonAttention):
    def step(self, layout: Layout) -> TritonStep:
        return _Flash3Step(self.cache, layout, self._tile)


class _Flash3Step(TritonStep):
    __slots__ = ()

    def decode(self, layer: AttentionLayer, q: Tensor, out: Tensor) -> None:
        layout = self.layout
        tables, lengths = layout.tables[: layout.num_decodes], layout.lengths[: layout.num_decodes]
        attended = self._attend(layer, q[:, None], tables, lengths, num_splits=layout.num_splits)
        out.copy_(attended[:, 0])

    def prefill(self, layer: AttentionLayer, tiles: Tiles, q: Tensor, out: Tensor) -> None:
        layout = self.layout
        tables, lengths = layout.tables[layout.num_decodes :], layout.lengths[layout.num_decodes :]
        out.copy_(
            self._attend(layer, q, tables, lengths, cu_seqlens_q=tiles.starts, max_seqlen_q=tiles.longest),
        )

    def _attend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        tables: Tensor,
        lengths: Tensor,
        **options: object,
    ) -> Tensor:
        # [blocks, block_size, 2 · kv_heads, head_dim]
        pages = self.cache.tensors[layer.index].unflatten(0, (-1, self.cache.block_size))
        keys, values = pages.split(layer.num_kv_heads, dim=2)
        attended: Tensor = flash_attn_interface.flash_attn_with_kvcache(
            q, keys, values,
            cache_seqlens=lengths, page_table=tables, softmax_scale=layer.scale, causal=True, **options,
        )  # fmt: skip
        return attended
