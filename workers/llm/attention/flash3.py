"""Attention by FlashAttention-3 (Shah et al. 2024), on the cache and with the plans of the Triton backend.
Needs its package, and Hopper.

Never run on a GPU so far: tests run it on a stand-in for the package.
"""

from __future__ import annotations

import flash_attn_interface
from torch import Tensor

from workers.llm.attention.triton import Layout, Tiles, TritonAttention


class Flash3Attention(TritonAttention):
    def _decode(self, cache: Tensor, layout: Layout, q: Tensor, out: Tensor) -> None:
        tables, lengths = layout.tables[: layout.num_decodes], layout.lengths[: layout.num_decodes]
        out.copy_(self._attend(cache, q[:, None], tables, lengths, num_splits=layout.num_splits)[:, 0])

    def _prefill(self, cache: Tensor, layout: Layout, tiles: Tiles, q: Tensor, out: Tensor) -> None:
        tables, lengths = layout.tables[layout.num_decodes :], layout.lengths[layout.num_decodes :]
        out.copy_(
            self._attend(cache, q, tables, lengths, cu_seqlens_q=tiles.starts, max_seqlen_q=tiles.longest)
        )

    def _attend(self, cache: Tensor, q: Tensor, tables: Tensor, lengths: Tensor, **options: object) -> Tensor:
        pages = cache.unflatten(0, (-1, self.block_size))  # [blocks, block_size, 2 · kv_heads, head_dim]
        keys, values = pages.split(self.num_kv_heads, dim=2)
        attended: Tensor = flash_attn_interface.flash_attn_with_kvcache(
            q,
            keys,
            values,
            cache_seqlens=lengths,
            page_table=tables,
            softmax_scale=self.head_dim**-0.5,
            causal=True,
            **options,
        )
        return attended
