"""Attention by compiled kernels, against a float64 reference over random shapes, with every instruction set
that this processor has."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.workers.llm.attention.kv_bits import BOUNDS, check_errors, check_poison, check_roundings
from tests.workers.llm.attention.spans import (
    check_wide_norms,
    make_cache,
    make_layer,
    make_spans,
    reference,
    slots_of,
)
from tests.workers.nn.native_versions import each_rows_version, each_version
from workers.llm.attention.base import HeadNorm, SequencePart
from workers.llm.attention.native import FEW, NativeAttention
from workers.llm.cache.spec import Paged
from workers.nn.layers import rotary_tables, rotate

__all__ = ["each_rows_version", "each_version"]
pytestmark = pytest.mark.usefixtures("each_version")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 1), (14, 2), (16, 8)])
def test_random_steps(num_heads: int, num_kv_heads: int, seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size, dim, num_blocks = rng.choice([4, 16]), rng.choice([16, 48, 80, 128]), 800
    decodes = [
        (1, rng.choice([0, 1, 15, 64, 255, 256, rng.randint(300, 700)])) for _ in range(rng.randint(0, 4))
    ]
    drafts = [(rng.randint(2, FEW), rng.choice([0, 1, 50, 255])) for _ in range(rng.randint(0, 2))]
    prefills = [
        (rng.randint(FEW + 1, 60), rng.choice([0, 1, 50])) for _ in range(rng.randint(not decodes, 2))
    ]
    cache = make_cache([Paged(num_kv_heads, dim)] * 2, num_blocks, block_size, dtype)
    spans = make_spans(rng, block_size, num_blocks, decodes + drafts + prefills + drafts)
    for span in spans:
        slots = slots_of(span, block_size)
        cache.tensors[1][slots] = torch.randn(len(slots), 2 * num_kv_heads, dim).to(dtype)
    assert NativeAttention.takes(cache)
    attention, layer = NativeAttention(cache), make_layer(1, num_heads, num_kv_heads, dim)
    num_tokens = sum(span.num_tokens for span in spans)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim).to(dtype)
    step = attention.plan(spans)
    step.write(layer, qkv, step.rotary(torch.randn(num_tokens, dim // 2), dtype))
    expected = reference(cache.tensors[1], block_size, spans, qkv[:, :num_heads])
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=tolerance, rtol=tolerance)
    assert bool(cache.tensors[0].isnan().all()), "another layer's cache is left alone"


@pytest.mark.usefixtures("each_rows_version")
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), [(14, 2, 64), (4, 4, 80), (6, 3, 128)])
def test_a_prompt_in_chunks_is_as_the_whole(num_heads: int, num_kv_heads: int, dim: int) -> None:
    """Two prompts of one step, the second behind a history of its own; cut anywhere. A cut of few tokens is
    computed by another kernel."""
    torch.manual_seed(dim)
    rng = random.Random(dim)
    whole = make_spans(rng, 16, 100, [(330, 0), (300, 50)])
    cache = make_cache([Paged(num_kv_heads, dim)], 100, 16, torch.bfloat16)
    cache.tensors[0][slots_of(whole[1], 16)] = torch.randn(50, 2 * num_kv_heads, dim).bfloat16()
    layer, attention = make_layer(0, num_heads, num_kv_heads, dim), NativeAttention(cache)
    qkv = torch.randn(630, num_heads + 2 * num_kv_heads, dim).bfloat16()
    angles = torch.randn(630, dim // 2)

    def attend(chunk: int) -> torch.Tensor:
        copy, found = qkv.clone(), torch.empty(630, num_heads, dim, dtype=torch.bfloat16)
        for start in range(0, 330, chunk):
            spans, rows = [], []
            for first, span in zip((0, 330), whole, strict=True):
                count = min(chunk, span.num_tokens - start)
                if count > 0:
                    spans.append(SequencePart(count, span.num_computed + start, span.block_table))
                    rows += range(first + start, first + start + count)
            of_chunk = copy[rows]
            step = attention.plan(spans)
            step.write(layer, of_chunk, step.rotary(angles[rows], torch.bfloat16))
            found[rows], copy[rows] = step.attend(layer, of_chunk), of_chunk
        expected = reference(cache.tensors[0], 16, whole, copy[:, :num_heads])
        torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)
        return found

    at_once = attend(330)
    assert torch.equal(attend(64)[:320], at_once[:320])
    for chunk in (1, 7, 16, 17):
        torch.testing.assert_close(attend(chunk), at_once, atol=0.02, rtol=0.02)


def test_scores_of_any_size_have_a_softmax() -> None:
    """Scores beyond what `exp` can hold, and a context in which one token is all."""
    torch.manual_seed(0)
    cache = make_cache([Paged(1, 16)], 100, 16)
    span = SequencePart(1, 700, list(range(44)))
    cache.tensors[0][:700] = 30 * torch.randn(700, 2, 16)
    layer, qkv = make_layer(0, 4, 1, 16), 30 * torch.randn(1, 6, 16)
    step = NativeAttention(cache).plan([span])
    step.write(layer, qkv, step.rotary(torch.zeros(1, 8), torch.float32))
    expected = reference(cache.tensors[0], 16, [span], qkv[:, :4])
    torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=0.01, rtol=1e-3)


def test_a_poisoned_key_is_not_ignored() -> None:
    cache = make_cache([Paged(1, 16)], 4, 16)
    cache.tensors[0][:40] = torch.randn(40, 2, 16)
    cache.tensors[0][7, 0, 3] = float("nan")
    layer, qkv = make_layer(0, 1, 1, 16), torch.randn(1, 3, 16)
    step = NativeAttention(cache).plan([SequencePart(1, 40, [0, 1, 2])])
    step.write(layer, qkv, step.rotary(torch.zeros(1, 8), torch.float32))
    assert step.attend(layer, qkv).isnan().all()


def test_a_result_does_not_depend_on_the_batch() -> None:
    rng = random.Random(2)
    torch.manual_seed(2)
    cache = make_cache([Paged(2, 32)], 400, 16)
    spans = make_spans(rng, 16, 400, [(1, 900), (1, 3), (1, 300), (5, 200)])
    for span in spans:
        slots = slots_of(span, 16)
        cache.tensors[0][slots] = torch.randn(len(slots), 4, 32)
    layer, attention = make_layer(0, 6, 2, 32), NativeAttention(cache)
    qkv, angles = torch.randn(8, 10, 32), torch.randn(8, 16)
    alone, start = [], 0
    for span in spans:
        rows = slice(start, start + span.num_tokens)
        step, copy = attention.plan([span]), qkv[rows].clone()
        step.write(layer, copy, step.rotary(angles[rows], torch.float32))
        alone.append(step.attend(layer, copy))
        start = rows.stop
    step = attention.plan(spans)
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    assert torch.equal(step.attend(layer, qkv), torch.cat(alone))


def test_norms_of_heads_may_have_weights_in_float32() -> None:
    check_wide_norms(NativeAttention)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("num_turned", [16, 4])
def test_heads_are_normed_and_turned_and_written(has_norm: bool, num_turned: int) -> None:
    """Of a head only the first numbers may turn."""
    torch.manual_seed(0)
    cache, dim = make_cache([Paged(2, 16)], 4, 4), 16
    norm = HeadNorm(torch.randn(dim), torch.randn(dim), 1e-6) if has_norm else None
    bias = torch.randn(8 * dim)
    layer = make_layer(0, 4, 2, dim, bias, norm)
    qkv, angles = torch.randn(3, 8, dim), torch.randn(3, num_turned // 2)
    expected = qkv + bias.view(8, dim)
    if norm is not None:
        expected[:, :4] = F.rms_norm(expected[:, :4], (dim,), norm.query, norm.eps)
        expected[:, 4:6] = F.rms_norm(expected[:, 4:6], (dim,), norm.key, norm.eps)
    turned = expected[:, :6, :num_turned]
    turned.copy_(rotate(turned.clone(), *rotary_tables(angles, torch.float32)))
    step = NativeAttention(cache).plan([SequencePart(3, 0, [1])])
    step.write(layer, qkv, step.rotary(angles, torch.float32))
    torch.testing.assert_close(qkv, expected)
    torch.testing.assert_close(cache.tensors[0][4:7], expected[:, 4:])


def test_heads_of_other_sizes_are_left_to_torch() -> None:
    assert not NativeAttention.takes(make_cache([Paged(2, 24)], 4, 4))
    assert not NativeAttention.takes(make_cache([Paged(2, 16)], 4, 4, torch.float16))


@pytest.mark.parametrize("name", BOUNDS)
def test_keys_and_values_in_8_bits(name: str) -> None:
    for dim in (16, 48, 128):
        assert 0 < check_errors(NativeAttention, name, torch.float32, dim) < BOUNDS[name]
    assert 0 < check_errors(NativeAttention, name, torch.bfloat16, 80) < 1.1 * BOUNDS[name]
    check_roundings(NativeAttention, name)
    check_poison(NativeAttention, name)


@pytest.mark.usefixtures("each_rows_version")
@pytest.mark.parametrize("name", BOUNDS)
def test_long_parts_in_bfloat16_read_8_bits(name: str) -> None:
    assert 0 < check_errors(NativeAttention, name, torch.bfloat16, 128) < 1.1 * BOUNDS[name]
