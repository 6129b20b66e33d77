"""Log-probabilities before any processor: of the chosen token first, then of the best tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Int64Array
from workers.nn.loader import to_device


class Logprobs(NamedTuple):
    """Of all rows of a step, so that one copy brings them to the host. Rows without logprobs have zeros."""

    values: Tensor  # [num_rows, 1 + max_logprobs] float32
    token_ids: Tensor  # [num_rows, 1 + max_logprobs] int64


class Wanted(NamedTuple):
    """Copies of the rows of requests with logprobs."""

    places: Tensor  # [n] int64: indices of rows of the logits
    logits: Tensor  # [n, vocab] float32
    max_logprobs: int


class LogprobTable:
    def __init__(self, num_slots: int) -> None:
        self._counts = np.full(num_slots, -1, dtype=np.int64)

    def start(self, slot: int, params: SamplingParams) -> None:
        self._counts[slot] = -1 if params.logprobs is None else params.logprobs

    def counts(self, slots: Int64Array) -> list[int]:
        """The number of best tokens that each row asked for; -1: no logprobs at all."""
        return [int(count) for count in self._counts[slots]]

    def wanted(self, logits: Tensor, slots: Int64Array) -> Wanted | None:
        """To be called before processors change the logits. None if no row asked for logprobs."""
        counts = self._counts[slots]
        if not (counts >= 0).any():
            return None
        places = to_device(np.flatnonzero(counts >= 0), logits.device)
        return Wanted(places, logits[places], int(counts.max()))


def logprobs_of(wanted: Wanted, token_ids: Tensor) -> Logprobs:
    """`token_ids` [num_rows] int64: the chosen tokens."""
    logprobs = wanted.logits.log_softmax(dim=-1)
    best = logprobs.topk(wanted.max_logprobs, dim=-1)
    ids = torch.cat([token_ids[wanted.places, None], best.indices], dim=-1)
    values = torch.cat([logprobs.gather(-1, ids[:, :1]), best.values], dim=-1)
    shape = len(token_ids), 1 + wanted.max_logprobs
    all_values, all_ids = values.new_zeros(shape), ids.new_zeros(shape)
    all_values[wanted.places], all_ids[wanted.places] = values, ids
    return Logprobs(all_values, all_ids)
