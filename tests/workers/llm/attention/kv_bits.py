"""Checks of a backend with keys and values in 8 bits, beside those in the model's type."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.workers.llm.attention.spans import CPU, make_layer, make_spans, reference
from workers.llm.attention.base import AttentionBackend, HeadNorm, SequencePart
from workers.llm.cache.kv_formats import FORMATS, KvFormat
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged

Backend = Callable[[PagedTensors], AttentionBackend]
HEADS, KV_HEADS, BLOCK, NUM_BLOCKS = 6, 2, 16, 40
# Of what random numbers attend to, in float32: half a step of 127, or of 8 between two powers of two, of
# numbers of which the largest is some three times the others.
BOUNDS = {"int8": 0.01, "fp8": 0.04}
# Of three sequences: their tokens, and where these are cut.
LENGTHS, CUTS = (71, 38, 60), (70, 33, 20)
FEW_LENGTHS, FEW_CUTS = (21, 8, 9), (20, 5, 3)  # for an interpreter


def make_cache(
    dtype: torch.dtype, kv_format: KvFormat | None, dim: int, device: torch.device
) -> PagedTensors:
    """What was never written must not be read."""
    cache = PagedTensors([Paged(KV_HEADS, dim)] * 2, NUM_BLOCKS, BLOCK, dtype, device, kv_format)
    for tensor in cache.scales or cache.tensors:
        tensor.fill_(float("nan"))
    return cache


def steps_of(rng: random.Random, lengths: Sequence[int], cuts: Sequence[int]) -> list[list[SequencePart]]:
    """Three prompts, then a token, drafts and a longer part behind them."""
    whole = make_spans(rng, BLOCK, NUM_BLOCKS, [(length, 0) for length in lengths])
    behind = [
        SequencePart(span.num_tokens - cut, cut, span.block_table)
        for span, cut in zip(whole, cuts, strict=True)
    ]
    return [
        [SequencePart(cut, 0, span.block_table) for span, cut in zip(whole, cuts, strict=True)],
        sorted(behind, key=lambda span: span.num_tokens > 1),
    ]


def attended(attention: AttentionBackend, steps: Sequence[list[SequencePart]], dim: int) -> list[Tensor]:
    """Queries behind `write`, then what is attended to, of each step; of the same numbers at each call."""
    torch.manual_seed(dim)
    dtype, device = attention.cache.dtype, attention.cache.device
    norm = HeadNorm(*(1 + 0.1 * torch.randn(2, dim)).to(device, dtype), 1e-6)
    layer = make_layer(1, HEADS, KV_HEADS, dim, None, norm)
    found = []
    for spans in steps:
        count = sum(span.num_tokens for span in spans)
        qkv = torch.randn(count, HEADS + 2 * KV_HEADS, dim).to(device, dtype)
        step = attention.plan(spans)
        step.write(layer, qkv, step.rotary(torch.randn(count, dim // 2).to(device), dtype))
        found += [qkv[:, :HEADS], step.attend(layer, qkv)]
    return found


def check_errors(
    backend: Backend, name: str, dtype: torch.dtype, dim: int, are_few: bool = False,
    device: torch.device = CPU,
) -> float:  # fmt: skip
    """That a backend attends to what its cache has, wherever a prompt is cut, and how far this is from what a
    cache in the model's type has: the relative error."""
    steps = steps_of(random.Random(dim), *((FEW_LENGTHS, FEW_CUTS) if are_few else (LENGTHS, CUTS)))
    caches = [make_cache(dtype, one, dim, device) for one in (None, FORMATS[name])]
    plain, lossy = (attended(backend(cache), steps, dim) for cache in caches)
    exact, kept = caches[0].tensors[1], caches[1].read(1, slice(None))
    errors = []
    for number, spans in enumerate(steps):
        q, out = lossy[2 * number : 2 * number + 2]
        torch.testing.assert_close(q, plain[2 * number])
        of_kept = reference(kept, BLOCK, spans, q)
        tolerance = 2e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out.double(), of_kept, atol=tolerance, rtol=tolerance)
        expected = reference(exact, BLOCK, spans, q)
        errors.append(float((out.double() - expected).norm() / expected.norm()))
    assert bool(caches[1].scales[0].isnan().all()), "another layer's cache is left alone"
    return max(errors)


def check_roundings(backend: Backend, name: str, device: torch.device = CPU) -> None:
    """To the nearest number, as torch rounds: all sizes, ties, and heads of zeros. A head whose largest
    number is the type's has a scale of 1."""
    torch.manual_seed(0)
    kv_format, dim, count = FORMATS[name], 64, 9
    halves = torch.arange(-253, 255, 2) / 2
    ties = halves if name == "int8" else (halves.to(kv_format.dtype).float() + halves) / 2
    sizes = torch.randn(count, 2 * KV_HEADS, dim).sign() * 2 ** (
        18 * torch.rand(count, 2 * KV_HEADS, dim) - 10
    )
    rows = torch.where(torch.rand(sizes.shape) < 0.3, ties[torch.randint(len(ties), sizes.shape)], sizes)
    rows = rows.clamp(-kv_format.largest, kv_format.largest)
    rows[:, :, 5] = -kv_format.largest
    rows[7] = 0
    cache = make_cache(torch.float32, kv_format, dim, device)
    step = backend(cache).plan([SequencePart(count, 0, [3])])
    qkv = torch.cat((torch.randn(count, HEADS, dim), rows), dim=1).to(device)
    step.write(
        make_layer(1, HEADS, KV_HEADS, dim),
        qkv,
        step.rotary(torch.zeros(count, dim // 2, device=device), torch.float32),
    )
    numbers, scales = (one[1][48 : 48 + count].cpu() for one in (cache.tensors, cache.scales))
    rounded = rows.round() if name == "int8" else rows
    assert torch.equal(numbers.view(torch.int8), rounded.to(kv_format.dtype).view(torch.int8))
    torch.testing.assert_close(scales, torch.where(rows.any(dim=2), 1.0, 1e-30 / kv_format.largest))


def check_poison(backend: Backend, name: str, device: torch.device = CPU) -> None:
    """A number that is not finite is seen by what attends to it."""
    for poison in (float("nan"), float("inf")):
        cache = make_cache(torch.float32, FORMATS[name], 16, device)
        qkv = torch.randn(6, HEADS + 2 * KV_HEADS, 16, device=device)
        qkv[3, HEADS, 2] = poison
        step, layer = backend(cache).plan([SequencePart(6, 0, [0])]), make_layer(1, HEADS, KV_HEADS, 16)
        step.write(layer, qkv, step.rotary(torch.zeros(6, 8, device=device), torch.float32))
        out = step.attend(layer, qkv)
        of_head = HEADS // KV_HEADS
        assert bool(out[3:, :of_head].isnan().all())
        assert bool(out[:, of_head:].isfinite().all()), "heads with other keys are as they were"
