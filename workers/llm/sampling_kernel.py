"""One Triton kernel that chooses the tokens of a step: greedy, or drawn from what top_k, top_p and min_p keep. For GPUs.

The threshold is found by bisection over the bits of a weight, as no sort of a vocabulary is as fast as a few looks at it. Nothing
waits for the host, so a CUDA graph can hold it; and a row depends on its own logits and numbers only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # logits of one turn
NUM_WARPS = 8
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_SCALE = tl.constexpr(1e30)  # times 0 it is still 0


@triton.jit
def _weights(row, tokens, best, scale, VOCAB: tl.constexpr):
    """How probable these tokens are beside the best, in [0, 1]."""
    logits = tl.load(row + tokens, mask=tokens < VOCAB, other=float("-inf"))
    return tl.exp2((logits - best) * scale)


@triton.jit
def _largest_threshold(row, best, scale, lower, wanted, VOCAB: tl.constexpr, TILE: tl.constexpr, COUNTS: tl.constexpr):
    """The largest weight, in bits, with which what is kept still comes to `wanted`: in tokens, or as the sum of their weights.

    Nothing with less than `lower` counts. Positive floats are ordered as their bits are; eight candidates a look settle three bits.
    """
    low = tl.full([], 0, tl.int32)
    step = tl.full([], 1 << 27, tl.int32)  # eight of them pass 1.0, which is 0x3F800000
    for _ in range(10):
        candidates = low + tl.arange(0, 8) * step
        found_by_lane = tl.zeros([8, TILE], tl.float32)
        for start in range(0, VOCAB, TILE):
            weights = _weights(row, start + tl.arange(0, TILE), best, scale, VOCAB)
            bits = weights.to(tl.int32, bitcast=True)
            is_kept = (bits[None, :] >= candidates[:, None]) & (bits >= lower)[None, :] & (weights > 0)[None, :]
            found_by_lane += tl.where(is_kept, 1.0 if COUNTS else weights[None, :], 0.0)
        found = tl.sum(found_by_lane, 1)  # once, not in each turn: it makes the whole program meet
        low += (tl.sum((found >= wanted).to(tl.int32), 0) - 1) * step
        low = tl.maximum(low, 0)
        step = step // 8
    return tl.maximum(low, lower)


@triton.jit(do_not_specialize=["params_stride"])  # the number of rows: else each would be a kernel of its own
def sample_kernel(logits, params, out, logits_stride, params_stride, VOCAB: tl.constexpr, TILE: tl.constexpr, SMALL_TILE: tl.constexpr):
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
        point = tl.load(params + 3 * params_stride + number)
        top_k = tl.load(params + 4 * params_stride + number).to(tl.int32, bitcast=True)
        scale = tl.minimum(LOG2_E / temperature, LARGEST_SCALE)
        least = min_p.to(tl.int32, bitcast=True)
        kept_by_rank = tl.full([], 0, tl.int32)
        if top_k < VOCAB:
            kept_by_rank = _largest_threshold(row, best, scale, kept_by_rank, top_k.to(tl.float32), VOCAB, SMALL_TILE, True)
            least = tl.maximum(least, kept_by_rank)
        if top_p < 1:
            kept_by_lane = tl.zeros([SMALL_TILE], tl.float32)
            for start in range(0, VOCAB, SMALL_TILE):
                weights = _weights(row, start + tl.arange(0, SMALL_TILE), best, scale, VOCAB)
                kept_by_lane += tl.where(weights.to(tl.int32, bitcast=True) >= kept_by_rank, weights, 0.0)
            kept = top_p * tl.sum(kept_by_lane, 0)
            least = tl.maximum(least, _largest_threshold(row, best, scale, kept_by_rank, kept, VOCAB, SMALL_TILE, False))
        total_by_lane = tl.zeros([TILE], tl.float32)
        for start in range(0, VOCAB, TILE):
            weights = _weights(row, start + tl.arange(0, TILE), best, scale, VOCAB)
            total_by_lane += tl.where(weights.to(tl.int32, bitcast=True) >= least, weights, 0.0)
        total = tl.sum(total_by_lane.to(tl.float64), 0)
        # The first token at which the sum passes the point; should rounding let none, the last that is kept.
        target, before = point * total, tl.full([], 0.0, tl.float64)
        first, last = VOCAB, 0
        for start in range(0, VOCAB, TILE):
            tokens = start + tl.arange(0, TILE)
            weights = _weights(row, tokens, best, scale, VOCAB)
            is_kept = (weights.to(tl.int32, bitcast=True) >= least) & (weights > 0)
            weights = tl.where(is_kept, weights, 0.0)
            sums = before + tl.cumsum(weights, 0)
            first = tl.minimum(first, tl.min(tl.where(is_kept & (sums > target), tokens, VOCAB), 0))
            last = tl.maximum(last, tl.max(tl.where(is_kept, tokens, 0), 0))
            before += tl.sum(weights, 0)
        choice = tl.where(first < VOCAB, first, last)
    tl.store(out + number, tl.minimum(choice, VOCAB - 1).to(tl.int64))


def sample(logits: Tensor, params: Tensor) -> Tensor:
    """One token [num_rows] int64 for each row of logits [num_rows, vocab] float32, by params [5, num_rows] int32.

    The numbers of the first four rows of params are float32 in the bits of an int32. Temperature 0 is greedy. `point` in [0, 1) is
    the random number. Tokens of equal probability are kept or cut together.
    """
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    tile = min(TILE, triton.next_power_of_2(vocab))
    sample_kernel[(num_rows,)](
        logits, params.view(torch.float32), out, logits.stride(0), params.stride(0), vocab, tile, min(tile, TILE // 4), num_warps=NUM_WARPS
    )
    return out
