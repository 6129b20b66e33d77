"""The Triton kernels in the interpreter, against a float64 reference over random shapes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from workers.llm.attention.torch import Span
from workers.llm.attention.triton import (
    MAX_SPLITS,
    TritonAttention,
    choose_num_splits,
    choose_prefill_tile,
    rotate_and_write,
)
from workers.nn.layers import rotary_tables, rotate

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")


def reference(cache: Tensor, block_size: int, spans: list[Span], q: Tensor) -> Tensor:
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
            span.num_computed
        )
        parts.append(
            torch.einsum("hns,shd->nhd", scores.masked_fill(~seen, -torch.inf).softmax(dim=-1), values)
        )
        row += span.num_tokens
    return torch.cat(parts)


def make_spans(
    rng: random.Random, block_size: int, num_blocks: int, sizes: list[tuple[int, int]]
) -> list[Span]:
    """(num_tokens, num_computed) each, on blocks anywhere in the cache."""
    free = rng.sample(range(num_blocks), num_blocks)
    return [
        Span(new, old, [free.pop() for _ in range(-(-(new + old) // block_size) + rng.randint(0, 1))])
        for new, old in sizes
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 1), (12, 2), (14, 2), (8, 1)])
def test_random_steps(num_heads: int, num_kv_heads: int, seed: int) -> None:
    rng = random.Random(100 * num_heads + seed)
    torch.manual_seed(seed)
    block_size, dim = rng.choice([1, 4, 16, 64]), rng.choice([16, 24, 128])
    dtype = rng.choice([torch.float32, torch.float16])
    decodes = [(1, rng.choice([0, 1, 15, 63, 64, 65, rng.randint(0, 300)])) for _ in range(rng.randint(0, 4))]
    prefills = [
        (rng.choice([2, 17, 64, 65, rng.randint(2, 90)]), rng.choice([0, 1, 16, rng.randint(0, 120)]))
        for _ in range(rng.randint(not decodes, 2))
    ]
    num_blocks = 1600 // block_size + 12
    attention = TritonAttention(2, num_blocks, block_size, num_kv_heads, dim, dtype, CPU)
    attention._tile = rng.choice(
        [choose_prefill_tile(80, torch.float16), choose_prefill_tile(90, torch.float16)]
    )
    attention._num_processors = rng.choice([1, 8, 64])  # so also splits that have nothing to do
    attention.cache.fill_(float("nan"))  # what was never written must not be read
    spans = make_spans(rng, block_size, num_blocks, decodes + prefills)
    for span in spans:
        slots = [
            span.block_table[position // block_size] * block_size + position % block_size
            for position in range(span.num_computed)
        ]
        attention.cache[1, slots] = torch.randn(len(slots), 2 * num_kv_heads, dim).to(dtype)
    num_tokens = sum(span.num_tokens for span in spans)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim).to(dtype)
    layout = attention.plan(spans)
    out = attention(1, layout, qkv, None, attention.rotary(torch.randn(num_tokens, dim // 2), dtype))
    expected = reference(attention.cache[1], block_size, spans, qkv[:, :num_heads])
    # and with the plan of a CUDA graph: filled up with rows that belong to nobody, and more splits than there
    # are keys
    if not prefills:
        new_slots = torch.cat([layout.new_slots, torch.tensor([attention.spare_slot], dtype=torch.int32)])
        lengths = torch.cat([layout.lengths, torch.ones(1, dtype=torch.int32)])
        tables = torch.cat(
            [layout.tables, torch.full_like(layout.tables[:1], attention.spare_slot // block_size)]
        )
        attention.cache[1, attention.spare_slot] = 0.0
        layout = attention.plan_decode(new_slots, tables, lengths, 4096)
        again = torch.empty(len(spans) + 1, num_heads, dim, dtype=dtype)
        attention._decode(attention.cache[1], layout, torch.cat([qkv, qkv[:1]])[:, :num_heads], again)
        torch.testing.assert_close(again[:-1].double(), expected, atol=4e-3, rtol=4e-3)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert bool(attention.cache[0].isnan().all()), "another layer's cache is left alone"


def test_every_processor_gets_something_to_do_and_no_split_is_without_keys() -> None:
    assert choose_num_splits(1, 2, 132, 8192) == MAX_SPLITS
    assert choose_num_splits(32, 2, 132, 8192) == 8
    assert choose_num_splits(256, 2, 132, 8192) == 1
    assert choose_num_splits(1, 2, 132, 100) == 2
    assert choose_num_splits(0, 2, 132, 0) == 1


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim"), [(2, 2, 16), (6, 1, 24), (12, 2, 128), (14, 2, 64)]
)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("has_bias", [True, False])
def test_rotation_and_cache_write_in_one(
    has_bias: bool, num_tokens: int, num_heads: int, num_kv_heads: int, dim: int
) -> None:
    torch.manual_seed(num_heads)
    all_heads = num_heads + 2 * num_kv_heads
    qkv, bias = torch.randn(num_tokens, all_heads, dim), torch.randn(all_heads * dim) if has_bias else None
    angles = 50 * torch.randn(num_tokens, dim // 2)
    cache = torch.full((40, 2 * num_kv_heads, dim), float("nan"))
    slots = torch.randperm(40)[:num_tokens]
    biased = qkv.clone() if bias is None else qkv + bias.view(all_heads, dim)
    turned = rotate(biased, *rotary_tables(angles, torch.float32))
    rotate_and_write(qkv, bias, angles.cos(), angles.sin(), slots, cache)
    torch.testing.assert_close(qkv[:, :num_heads], turned[:, :num_heads])
    torch.testing.assert_close(cache[slots, :num_kv_heads], turned[:, num_heads : num_heads + num_kv_heads])
    torch.testing.assert_close(cache[slots, num_kv_heads:], biased[:, num_heads + num_kv_heads :])
    untouched = torch.ones(40, dtype=torch.bool).index_fill_(0, slots, False)
    assert bool(cache[untouched].isnan().all())
