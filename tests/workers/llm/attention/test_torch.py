"""Attention in plain torch, against a float64 reference over random shapes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.workers.llm.attention.kv_bits import BOUNDS, check_errors, check_poison, check_roundings
from tests.workers.llm.attention.spans import (
    check_wide_norms,
    make_cache,
    make_layer,
    make_spans,
    reference,
    slots_of,
)
from workers.llm.attention.base import HeadNorm, SequencePart
from workers.llm.attention.torch import FEW_TOKENS, PagedAttention, PromptPart, _TorchStep
from workers.llm.cache.spec import Paged
from workers.nn.layers import rotary_tables, rotate


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 1), (14, 2)])
def test_random_steps(num_heads: int, num_kv_heads: int, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size, dim, num_blocks = rng.choice([4, 16]), rng.choice([16, 24]), 400
    decodes = [(1, rng.choice([0, 1, 15, 64, rng.randint(0, 300)])) for _ in range(rng.randint(0, 4))]
    prefills = [(rng.randint(2, 60), rng.choice([0, 1, 50])) for _ in range(rng.randint(not decodes, 2))]
    cache = make_cache([Paged(num_kv_heads, dim)] * 2, num_blocks, block_size)
    spans = make_spans(rng, block_size, num_blocks, decodes + prefills)
    for span in spans:
        slots = slots_of(span, block_size)
        cache.tensors[1][slots] = torch.randn(len(slots), 2 * num_kv_heads, dim)
    attention, layer = PagedAttention(cache), make_layer(1, num_heads, num_kv_heads, dim)
    num_tokens = sum(span.num_tokens for span in spans)
    qkv, angles = (
        torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim),
        torch.randn(num_tokens, dim // 2),
    )
    step = attention.plan(spans)
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    expected = reference(cache.tensors[1], block_size, spans, qkv[:, :num_heads])
    torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=2e-5, rtol=2e-5)
    assert bool(cache.tensors[0].isnan().all()), "another layer's cache is left alone"


@pytest.mark.parametrize("num_runs", [1, 2])
@pytest.mark.parametrize("num_tokens", [2, FEW_TOKENS, FEW_TOKENS + 1])
def test_a_few_tokens_behind_a_long_history(num_tokens: int, num_runs: int) -> None:
    """Decodes with drafts, whose heads are folded."""
    torch.manual_seed(num_tokens)
    cache = make_cache([Paged(2, 64)], 80, 16)
    table = [*range(40, 80), *range(40)] if num_runs == 1 else [*range(1, 80, 2), *range(0, 80, 2)]
    spans = [SequencePart(num_tokens, 900, table[:60]), SequencePart(3, 280, table[60:])]
    for span in spans:
        slots = slots_of(span, 16)
        cache.tensors[0][slots] = torch.randn(len(slots), 4, 64)
    attention, layer = PagedAttention(cache), make_layer(0, 6, 2, 64)
    qkv, angles = torch.randn(num_tokens + 3, 10, 64), torch.randn(num_tokens + 3, 32)
    step = attention.plan(spans)
    assert isinstance(step, _TorchStep)
    folded = [isinstance(other, PromptPart) and other.is_folded for other in step.layout.others]
    assert folded == [num_tokens <= FEW_TOKENS, True]
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    expected = reference(cache.tensors[0], 16, spans, qkv[:, :6])
    torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=2e-5, rtol=2e-5)


def test_decodes_planned_on_the_device_are_those_of_the_host() -> None:
    """Filled up with a row that belongs to nobody, and a longest context beyond all of them."""
    rng = random.Random(1)
    torch.manual_seed(1)
    cache = make_cache([Paged(2, 16)], 60, 4)
    attention, layer = PagedAttention(cache), make_layer(0, 6, 2, 16)
    spans = make_spans(rng, 4, 60, [(1, 9), (1, 0), (1, 30)])
    for span in spans:
        slots = slots_of(span, 4)
        cache.tensors[0][slots] = torch.randn(len(slots), 4, 16)
    qkv, angles = torch.randn(3, 10, 16), torch.randn(3, 8)
    step = attention.plan(spans)
    again = qkv.clone()
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    expected = step.attend(layer, qkv)
    tables = torch.full((4, 12), cache.spare_slot // 4, dtype=torch.int32)
    for row, span in zip(tables[:3], spans, strict=True):
        row[: len(span.block_table)] = torch.tensor(span.block_table)
    last = [slots_of(SequencePart(0, span.length, span.block_table), 4)[-1] for span in spans]
    new_slots = torch.tensor([*last, cache.spare_slot], dtype=torch.int32)
    lengths = torch.tensor([*(span.length for span in spans), 1], dtype=torch.int32)
    step = attention.plan_decode(new_slots, tables, lengths, 500)
    padded = torch.cat((again, torch.randn(1, 10, 16)))
    step.write(layer, padded, step.rotary(torch.cat((angles, torch.zeros(1, 8))), torch.float32))
    torch.testing.assert_close(step.attend(layer, padded)[:3], expected)


def test_norms_of_heads_may_have_weights_in_float32() -> None:
    check_wide_norms(PagedAttention)


@pytest.mark.parametrize("has_bias", [True, False])
def test_heads_are_normed_before_they_are_turned(has_bias: bool) -> None:
    torch.manual_seed(0)
    cache, dim = make_cache([Paged(2, 16)], 4, 4), 16
    norm = HeadNorm(torch.randn(dim), torch.randn(dim), 1e-6)
    bias = torch.randn(8 * dim) if has_bias else None
    layer = make_layer(0, 4, 2, dim, bias, norm)
    qkv, angles = torch.randn(3, 8, dim), torch.randn(3, dim // 2)
    plain = qkv.clone() if bias is None else qkv + bias.view(8, dim)
    q = F.rms_norm(plain[:, :4], (dim,), norm.query, norm.eps)
    k = F.rms_norm(plain[:, 4:6], (dim,), norm.key, norm.eps)
    tables = rotary_tables(angles, torch.float32)
    step = PagedAttention(cache).plan([SequencePart(3, 0, [1])])
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    torch.testing.assert_close(qkv[:, :4], rotate(q, *tables))
    written: Tensor = cache.tensors[0][4:7]
    torch.testing.assert_close(written[:, :2], rotate(k, *tables))
    torch.testing.assert_close(written[:, 2:], plain[:, 6:])


@pytest.mark.parametrize("name", BOUNDS)
def test_keys_and_values_in_8_bits(name: str) -> None:
    assert 0 < check_errors(PagedAttention, name, torch.float32, 24) < BOUNDS[name]
    assert 0 < check_errors(PagedAttention, name, torch.bfloat16, 128) < 1.1 * BOUNDS[name]
    check_roundings(PagedAttention, name)
    check_poison(PagedAttention, name)
