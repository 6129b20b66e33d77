"""Chooses the next tokens. Counter-based: the random number of token k of a request depends on (seed, k) and nothing else.

So a request draws the same tokens whatever runs beside it, and again when it is resumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.sampling import SamplingParams

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Draw(NamedTuple):
    """One row of logits: its request's sampling, and which of its tokens is to be drawn."""

    sampling: SamplingParams
    number: int


def uniform(seeds: npt.NDArray[np.uint64], indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, index), by the mixer of SplitMix64 (Steele, Lea, Flood 2014) applied twice."""
    return (_mix(_mix(seeds) + indices * GOLDEN) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Token ids for logits [num_rows, vocab] float32, one draw a row. Temperature 0 takes the best token.

    `top_k` keeps the k best tokens, then `top_p` the fewest best ones whose probabilities reach p; one is drawn by inverting
    the cumulative distribution.
    """
    token_ids = logits.argmax(dim=-1)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if rows:
        params = [draws[row].sampling for row in rows]
        token_ids[rows] = _draw(logits[rows], params, [draws[row].number for row in rows])
    return [int(token) for token in token_ids.tolist()]


def _draw(logits: Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> Tensor:
    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    vocab = logits.shape[-1]
    # The best logit is made 0 first, so that no temperature, however small, can overflow it.
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / column([p.temperature for p in params])
    probs, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=logits.device)[None]
    probs = probs.masked_fill(rank >= column([p.top_k if p.top_k > 0 else vocab for p in params]), 0.0)
    probs = probs / probs.sum(dim=-1, keepdim=True)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= column([p.top_p for p in params]), 0.0)
    cumulative = probs.cumsum(dim=-1)
    seeds = np.array([p.seed or 0 for p in params], dtype=np.uint64)
    point = column(uniform(seeds, np.array(indices, dtype=np.uint64)).tolist()) * cumulative[:, -1:]
    # The first token whose cumulative probability exceeds the point. Rounding must not push it into the tokens of probability 0.
    last = (probs > 0).sum(dim=-1, keepdim=True) - 1
    chosen = torch.minimum(torch.searchsorted(cumulative, point, right=True), last)
    return order.gather(-1, chosen)[:, 0]
