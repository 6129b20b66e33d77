"""Log-probabilities as the model gave them, before any processor.

That of the chosen token comes first, then those of the best ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Int64Array
from workers.nn.loader import to_device


class Logprobs(NamedTuple):
    """Of all rows of a step, so that they reach the host in one piece. Rows that did not ask have zeros."""

    values: Tensor  # [num_rows, 1 + most] float32
    token_ids: Tensor  # [num_rows, 1 + most] int64


class Wanted(NamedTuple):
    """The rows that asked, as the model computed them."""

    places: Tensor  # [n] int64: which rows of the logits
    logits: Tensor  # [n, vocab] float32
    most: int


class LogprobTable:
    def __init__(self, num_slots: int) -> None:
        self._counts = np.full(num_slots, -1, dtype=np.int64)

    def start(self, slot: int, params: SamplingParams) -> None:
        self._counts[slot] = -1 if params.logprobs is None else params.logprobs

    def counts(self, slots: Int64Array) -> list[int]:
        """How many best ones each row asked for; -1: none, not even its own."""
        return [int(count) for count in self._counts[slots]]

    def wanted(self, logits: Tensor, slots: Int64Array) -> Wanted | None:
        """A copy of the rows that asked: to be taken before processors change them."""
        counts = self._counts[slots]
        if not (counts >= 0).any():
            return None
        places = to_device(np.flatnonzero(counts >= 0), logits.device)
        return Wanted(places, logits[places], int(counts.max()))


def logprobs_of(wanted: Wanted, token_ids: Tensor) -> Logprobs:
    """`token_ids` [num_rows] int64: the chosen ones."""
    logprobs = wanted.logits.log_softmax(dim=-1)
    best = logprobs.topk(wanted.most, dim=-1)
    ids = torch.cat([token_ids[wanted.places, None], best.indices], dim=-1)
    values = torch.cat([logprobs.gather(-1, ids[:, :1]), best.values], dim=-1)
    shape = len(token_ids), 1 + wanted.most
    all_values, all_ids = values.new_zeros(shape), ids.new_zeros(shape)
    all_values[wanted.places], all_ids[wanted.places] = values, ids
    return Logprobs(all_values, all_ids)
