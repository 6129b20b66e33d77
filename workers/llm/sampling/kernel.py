"""One Triton kernel that chooses the tokens of a step, greedy or drawn from those that top_k, top_p and min_p
keep. For GPUs.

The threshold is found by bisection over the bits of a weight: a few passes over the vocabulary are faster
than a sort. The draw is the race of noise.py, with the same random bits. There is no synchronisation with the
host, as a CUDA graph needs it; and a row depends only on its own logits and parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.llm.sampling import choice, noise

TILE = 4096  # logits of one iteration
NUM_WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_SCALE = tl.constexpr(choice.LARGEST_SCALE)
GOLDEN, MIX_1, MIX_2 = tl.constexpr(noise.GOLDEN), tl.constexpr(noise.MIX_1), tl.constexpr(noise.MIX_2)
SHIFT_1, SHIFT_2, SHIFT_3 = (
    tl.constexpr(noise.SHIFT_1),
    tl.constexpr(noise.SHIFT_2),
    tl.constexpr(noise.SHIFT_3),
)
LOW_BITS, UNIT = tl.constexpr(noise.LOW_BITS), tl.constexpr(noise.UNIT)
SMALLEST, LARGEST = tl.constexpr(noise.SMALLEST), tl.constexpr(noise.LARGEST)
SERIES_BELOW = tl.constexpr(0.125)  # 1 - u: the logarithm of u is taken from its series


@triton.jit
def _weights(row, tokens, best, scale, VOCAB: tl.constexpr):
    """Probabilities of these tokens relative to the best token's, in [0, 1]."""
    logits = tl.load(row + tokens, mask=tokens < VOCAB, other=float("-inf"))
    return tl.exp2((logits - best) * scale)


@triton.jit
def _largest_threshold(
    row, best, scale, lower, wanted, VOCAB: tl.constexpr, TILE: tl.constexpr, COUNTS: tl.constexpr
):
    """The largest threshold, in bits of a weight, at which the kept tokens still reach `wanted`: in number,
    or as the sum of their weights.

    Weights below `lower` do not count. Positive floats are ordered as their bits are; eight candidates in
    each pass settle three bits.
    """
    low = tl.full([], 0, tl.int32)
    step = tl.full([], 1 << 27, tl.int32)  # eight of them pass 1.0, which is 0x3F800000
    for _ in range(10):
        candidates = low + tl.arange(0, 8) * step
        found_by_lane = tl.zeros([8, TILE], tl.float32)
        for start in range(0, VOCAB, TILE):
            weights = _weights(row, start + tl.arange(0, TILE), best, scale, VOCAB)
            bits = weights.to(tl.int32, bitcast=True)
            is_kept = (
                (bits[None, :] >= candidates[:, None]) & (bits >= lower)[None, :] & (weights > 0)[None, :]
            )
            found_by_lane += tl.where(is_kept, 1.0 if COUNTS else weights[None, :], 0.0)
        found = tl.sum(found_by_lane, 1)  # once, not in each iteration: it synchronises the program
        low += (tl.sum((found >= wanted).to(tl.int32), 0) - 1) * step
        low = tl.maximum(low, 0)
        step = step // 8
    return tl.maximum(low, lower)


@triton.jit
def _random_bits(key, tokens):
    """SplitMix64's outputs, uint64, of these tokens in the stream that starts at `key`: see noise.py."""
    bits = key + (tokens + 1).to(tl.uint64) * tl.full([], GOLDEN, tl.uint64)
    bits = (bits ^ (bits >> SHIFT_1)) * tl.full([], MIX_1, tl.uint64)
    bits = (bits ^ (bits >> SHIFT_2)) * tl.full([], MIX_2, tl.uint64)
    return bits ^ (bits >> SHIFT_3)


@triton.jit
def _exponentials(bits):
    """-log(u); close to u = 1 by its series, whose error is below 6e-8: there a GPU's fast logarithm has no
    correct digit.
    """
    rest = (bits & LOW_BITS).to(tl.int64).to(tl.float32) * UNIT  # 1 - u
    rest = tl.minimum(tl.maximum(rest, SMALLEST), LARGEST)
    series = 1.0 + rest * (
        1 / 2 + rest * (1 / 3 + rest * (1 / 4 + rest * (1 / 5 + rest * (1 / 6 + rest / 7))))
    )
    return tl.where(rest < SERIES_BELOW, rest * series, -tl.log(1.0 - rest))


@triton.jit
def _first(row, best, scale, least, key, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The winner of the race among tokens whose weight, in bits, is `least` or more."""
    time_by_lane = tl.full([TILE], float("inf"), tl.float32)
    choice_by_lane = tl.full([TILE], VOCAB, tl.int32)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        weights = _weights(row, tokens, best, scale, VOCAB)
        is_kept = (weights.to(tl.int32, bitcast=True) >= least) & (weights > 0)
        times = _exponentials(_random_bits(key, tokens)) / tl.where(is_kept, weights, 1.0)
        is_first = is_kept & (times < time_by_lane)
        choice_by_lane = tl.where(is_first, tokens, choice_by_lane)
        time_by_lane = tl.where(is_first, times, time_by_lane)
    return tl.min(tl.where(time_by_lane == tl.min(time_by_lane, 0), choice_by_lane, VOCAB), 0)


@triton.jit(do_not_specialize=["params_stride"])  # the number of rows: no kernel of its own for each
def sample_kernel(
    logits,
    params,
    out,
    logits_stride,
    params_stride,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    SMALL_TILE: tl.constexpr,
):
    """Program (row)."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * logits_stride
    temperature = tl.load(params + number)
    best_by_lane = tl.full([TILE], float("-inf"), tl.float32)
    choice_by_lane = tl.zeros([TILE], tl.int32)
    for start in range(0, VOCAB, TILE):
        tokens = start + tl.arange(0, TILE)
        tile = tl.load(row + tokens, mask=tokens < VOCAB, other=float("-inf"))
        choice_by_lane = tl.where(tile > best_by_lane, tokens, choice_by_lane)
        best_by_lane = tl.maximum(best_by_lane, tile)
    best = tl.max(best_by_lane, 0)
    choice = tl.min(tl.where(best_by_lane == best, choice_by_lane, VOCAB), 0)
    if temperature > 0:
        top_p, min_p = tl.load(params + params_stride + number), tl.load(params + 2 * params_stride + number)
        top_k = tl.load(params + 3 * params_stride + number).to(tl.int32, bitcast=True)
        scale = tl.minimum(LOG2_E / temperature, LARGEST_SCALE)
        least = min_p.to(tl.int32, bitcast=True)
        kept_by_rank = tl.full([], 0, tl.int32)
        if top_k < VOCAB:
            kept_by_rank = _largest_threshold(
                row, best, scale, kept_by_rank, top_k.to(tl.float32), VOCAB, SMALL_TILE, True
            )
            least = tl.maximum(least, kept_by_rank)
        if top_p < 1:
            kept_by_lane = tl.zeros([SMALL_TILE], tl.float32)
            for start in range(0, VOCAB, SMALL_TILE):
                weights = _weights(row, start + tl.arange(0, SMALL_TILE), best, scale, VOCAB)
                kept_by_lane += tl.where(weights.to(tl.int32, bitcast=True) >= kept_by_rank, weights, 0.0)
            kept = top_p * tl.sum(kept_by_lane, 0)
            least = tl.maximum(
                least, _largest_threshold(row, best, scale, kept_by_rank, kept, VOCAB, SMALL_TILE, False)
            )
        low = tl.load(params + 4 * params_stride + number).to(tl.uint32, bitcast=True).to(tl.uint64)
        high = tl.load(params + 5 * params_stride + number).to(tl.uint32, bitcast=True).to(tl.uint64)
        choice = _first(row, best, scale, least, (high << 32) | low, VOCAB, SMALL_TILE)
    tl.store(out + number, tl.minimum(choice, VOCAB - 1).to(tl.int64))


def sample(logits: Tensor, params: Tensor) -> Tensor:
    """Tokens [num_rows] int64 from logits [num_rows, vocab] float32 and params [6, num_rows] int32.

    The rows of params: temperature, top_p and min_p as the bits of float32; top_k; the low and the high half
    of `draw_keys`. Temperature 0 is greedy. Tokens of equal probability are kept or cut together.
    """
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    tile = min(TILE, triton.next_power_of_2(vocab))
    sample_kernel[(num_rows,)](
        logits,
        params.view(torch.float32),
        out,
        logits.stride(0),
        params.stride(0),
        vocab,
        tile,
        min(tile, TILE // 4),
        num_warps=NUM_WARPS,
    )
    return out
