"""The tokens that top_k, top_p and min_p keep. Tokens of equal probability are kept or cut together."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens that are sorted first; if these do not reach a row's top_p, all are sorted.
NUM_CANDIDATES = 1024


def least_probable(probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest kept probability [num_rows, 1] of probs [num_rows, vocab]; the cuts are [num_rows, 1].

    All are float64. top_p applies to the probability that top_k keeps; min_p is independent of both.
    """
    vocab_size = probs.shape[-1]
    num_sorted = min(NUM_CANDIDATES, vocab_size)
    least, is_enough = _cut(probs.topk(num_sorted, dim=-1).values, top_k, top_p, vocab_size)
    if num_sorted < vocab_size and not bool(is_enough.all()):
        rows = (~is_enough[:, 0]).nonzero()[:, 0]
        all_sorted = probs[rows].sort(dim=-1, descending=True).values
        least[rows] = _cut(all_sorted, top_k[rows], top_p[rows], vocab_size)[0]
    return torch.maximum(least, probs.amax(dim=-1, keepdim=True) * min_p)


def _cut(best: Tensor, top_k: Tensor, top_p: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The smallest kept of the `best` probabilities [num_rows, n], and whether n were enough to know it."""
    rank = torch.arange(best.shape[-1], device=best.device)[None]
    kept = best.masked_fill(rank >= top_k, 0.0)
    cumulative = kept.cumsum(dim=-1)
    # The probability that top_k keeps, or 1.
    total = torch.where(top_k <= best.shape[-1], cumulative[:, -1:], 1.0)
    num_kept = ((cumulative - kept < top_p * total) & (kept > 0)).sum(dim=-1, keepdim=True)
    # With a larger top_k the total is known only when all are sorted.
    is_enough = (top_k <= best.shape[-1]) | ((top_k >= vocab_size) & (num_kept < best.shape[-1]))
    return best.gather(-1, (num_kept - 1).clamp(min=0)), is_enough
