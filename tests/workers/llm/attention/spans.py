"""Random steps, and their attention in float64."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.llm.attention.base import AttentionBackend, AttentionLayer, HeadNorm, SequencePart
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged

CPU = torch.device("cpu")


def reference(cache: Tensor, block_size: int, spans: list[SequencePart], q: Tensor) -> Tensor:
    """[num_tokens, heads, dim] in float64: gathered, masked, one sequence after the other."""
    num_kv_heads, dim = cache.shape[1] // 2, cache.shape[2]
    parts, row = [], 0
    for span in spans:
        slots = [
            span.block_table[position // block_size] * block_size + position % block_size
            for position in range(span.length)
        ]
        group = q.shape[1] // num_kv_heads
        keys, values = (
            part.repeat_interleave(group, dim=1) for part in cache[slots].double().split(num_kv_heads, dim=1)
        )
        queries = q[row : row + span.num_tokens].double()
        scores = torch.einsum("nhd,shd->hns", queries, keys) * dim**-0.5
        seen = torch.ones(span.num_tokens, span.length, dtype=torch.bool, device=q.device).tril(
            span.num_computed,
        )
        parts.append(
            torch.einsum("hns,shd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), values),
        )
        row += span.num_tokens
    return torch.cat(parts)


def make_spans(
    rng: random.Random,
    block_size: int,
    num_blocks: int,
    sizes: list[tuple[int, int]],
) -> list[SequencePart]:
    """(num_tokens, num_computed) each, on blocks anywhere in the cache."""
    free = rng.sample(range(num_blocks), num_blocks)
    return [
        SequencePart(new, old, [free.pop() for _ in range(-(-(new + old) // block_size) + rng.randint(0, 1))])
        for new, old in sizes
    ]


def make_layer(
    index: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
    bias: Tensor | None = None,
    norm: HeadNorm | None = None,
) -> AttentionLayer:
    return AttentionLayer(
        index=index,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        bias=bias,
        norm=norm,
    )


def make_cache(
    layers: list[Paged], num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32
) -> PagedTensors:
    """What was never written must not be read."""
    cache = PagedTensors(layers, num_blocks, block_size, dtype, CPU)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    return cache


def slots_of(span: SequencePart, block_size: int) -> list[int]:
    slots = [block * block_size + place for block in span.block_table for place in range(block_size)]
    return slots[: span.num_computed]


def check_wide_norms(attention: Callable[[PagedTensors], AttentionBackend]) -> None:
    """Norms of heads, in a model in bfloat16, have weights in float32."""
    torch.manual_seed(0)
    cache, dim = make_cache([Paged(2, 16)], 4, 4, torch.bfloat16), 16
    norm = HeadNorm(1 + 0.01 * torch.randn(dim), 1 + 0.01 * torch.randn(dim), 1e-6)
    layer, qkv = make_layer(0, 4, 2, dim, None, norm), torch.randn(3, 8, dim).bfloat16()
    q, k = qkv[:, :4].double(), qkv[:, 4:6].double()
    step = attention(cache).plan([SequencePart(3, 0, [1])])
    step.write(layer, qkv, step.rotary(torch.zeros(3, dim // 2), torch.bfloat16))
    for found, heads, weight in ((qkv[:, :4], q, norm.query), (cache.tensors[0][4:7, :2], k, norm.key)):
        expected = F.rms_norm(heads, (dim,), weight.double(), norm.eps)
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=2**-8)
