"""The Triton kernels in the interpreter, against a float64 reference over random shapes."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from tests.workers.llm.attention.kv_bits import BOUNDS, check_errors, check_poison, check_roundings
from tests.workers.llm.attention.spans import make_layer, make_spans, reference
from workers.llm.attention.base import HeadNorm, SequencePart
from workers.llm.attention.triton import (
    MAX_SPLITS,
    Numbers,
    TritonAttention,
    choose_num_splits,
    choose_prefill_tile,
    norm_rotate_and_write,
)
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged
from workers.nn.layers import rotary_tables, rotate

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(2))
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
    cache = PagedTensors([Paged(num_kv_heads, dim)] * 2, num_blocks, block_size, dtype, CPU)
    attention, layer = TritonAttention(cache), make_layer(1, num_heads, num_kv_heads, dim)
    attention._tile = rng.choice(
        [choose_prefill_tile(capability, torch.float16, dim) for capability in (80, 90)],
    )
    attention._num_processors = rng.choice([1, 8, 64])  # so also splits that have nothing to do
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))  # what was never written must not be read
    spans = make_spans(rng, block_size, num_blocks, decodes + prefills)
    for span in spans:
        slots = [
            span.block_table[position // block_size] * block_size + position % block_size
            for position in range(span.num_computed)
        ]
        cache.tensors[1][slots] = torch.randn(len(slots), 2 * num_kv_heads, dim).to(dtype)
    num_tokens = sum(span.num_tokens for span in spans)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim).to(dtype)
    step = attention.plan(spans)
    step.write(layer, qkv, step.rotary(torch.randn(num_tokens, dim // 2), dtype))
    out = step.attend(layer, qkv)
    expected = reference(cache.tensors[1], block_size, spans, qkv[:, :num_heads])
    # and with the plan of a CUDA graph: filled up with rows that belong to nobody, and more splits than there
    # are keys
    if not prefills:
        layout, spare = step.layout, cache.spare_slot
        new_slots = torch.cat([layout.new_slots, torch.tensor([spare], dtype=torch.int32)])
        lengths = torch.cat([layout.lengths, torch.ones(1, dtype=torch.int32)])
        tables = torch.cat([layout.tables, torch.full_like(layout.tables[:1], spare // block_size)])
        cache.tensors[1][spare] = 0.0
        padded = attention.plan_decode(new_slots, tables, lengths, 4096)
        again = padded.attend(layer, torch.cat([qkv, qkv[:1]]))
        torch.testing.assert_close(again[:-1].double(), expected, atol=4e-3, rtol=4e-3)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert bool(cache.tensors[0].isnan().all()), "another layer's cache is left alone"


def test_every_processor_gets_something_to_do_and_no_split_is_without_keys() -> None:
    assert choose_num_splits(1, 2, 132, 8192) == MAX_SPLITS
    assert choose_num_splits(32, 2, 132, 8192) == 8
    assert choose_num_splits(256, 2, 132, 8192) == 1
    assert choose_num_splits(1, 2, 132, 100) == 2
    assert choose_num_splits(0, 2, 132, 0) == 1


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dim"),
    [(2, 2, 16), (6, 1, 24), (12, 2, 128), (14, 2, 64)],
)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_norm", [True, False])
def test_norm_rotation_and_cache_write_in_one(
    has_norm: bool,
    has_bias: bool,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    dim: int,
) -> None:
    torch.manual_seed(num_heads)
    all_heads, num_turned = num_heads + 2 * num_kv_heads, num_heads + num_kv_heads
    qkv, bias = torch.randn(num_tokens, all_heads, dim), torch.randn(all_heads * dim) if has_bias else None
    norm = HeadNorm(torch.randn(dim), torch.randn(dim), 1e-6) if has_norm else None
    angles = 50 * torch.randn(num_tokens, dim // 2)
    cache = torch.full((40, 2 * num_kv_heads, dim), float("nan"))
    slots = torch.randperm(40)[:num_tokens]
    expected = qkv.clone() if bias is None else qkv + bias.view(all_heads, dim)
    if norm is not None:
        q, k = expected[:, :num_heads], expected[:, num_heads:num_turned]
        q.copy_(F.rms_norm(q, (dim,), norm.query, norm.eps))
        k.copy_(F.rms_norm(k, (dim,), norm.key, norm.eps))
    turned = rotate(expected, *rotary_tables(angles, torch.float32))
    layer = make_layer(0, num_heads, num_kv_heads, dim, bias, norm)
    norm_rotate_and_write(layer, qkv, (angles.cos(), angles.sin()), slots, Numbers(cache, cache, 0))
    torch.testing.assert_close(qkv[:, :num_heads], turned[:, :num_heads])
    torch.testing.assert_close(cache[slots, :num_kv_heads], turned[:, num_heads:num_turned])
    torch.testing.assert_close(cache[slots, num_kv_heads:], expected[:, num_turned:])
    untouched = torch.ones(40, dtype=torch.bool).index_fill_(0, slots, False)
    assert bool(cache[untouched].isnan().all())


def test_layers_may_have_heads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warmed up, too, for a few numbers of splits, and nothing but the spare block is written to."""
    monkeypatch.setattr("workers.llm.attention.triton.MAX_SPLITS", 4)
    shapes = [(4, 2, 16), (6, 1, 32), (6, 1, 32)]
    cache = PagedTensors([Paged(kv, dim) for _, kv, dim in shapes], 4, 4, torch.float32, CPU)
    for tensor in cache.tensors:
        tensor.fill_(float("nan"))
    attention = TritonAttention(cache)
    layers = [make_layer(index, *shape) for index, shape in enumerate(shapes)]
    attention.warm_up(layers)
    assert all(bool(tensor[: cache.spare_slot].isnan().all()) for tensor in cache.tensors)
    spans = [SequencePart(3, 0, [2])]
    step = attention.plan(spans)
    for layer, (num_heads, num_kv_heads, dim) in zip(layers, shapes, strict=True):
        qkv = torch.randn(3, num_heads + 2 * num_kv_heads, dim)
        step.write(layer, qkv, step.rotary(torch.randn(3, dim // 2), torch.float32))
        expected = reference(cache.tensors[layer.index], 4, spans, qkv[:, :num_heads])
        torch.testing.assert_close(step.attend(layer, qkv).double(), expected, atol=2e-5, rtol=2e-5)


# NaN becomes any whole number: its scale is NaN.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("name", "dim"), [("int8", 24), ("fp8", 32)])
def test_keys_and_values_in_8_bits(name: str, dim: int) -> None:
    assert 0 < check_errors(TritonAttention, name, torch.float16, dim, are_few=True) < BOUNDS[name]
    check_roundings(TritonAttention, name)
    check_poison(TritonAttention, name)
