"""Log-probabilities of a prompt's own tokens, from the steps that compute the prompt, chunk by chunk."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.llm.sampling.base import Int64Array
from workers.llm.sampling.logprobs import Wanted, logprobs_of
from workers.llm.sampling.tokens import PromptScores

MAX_ROWS = 128  # of logits at once: 74 MiB with Qwen's vocabulary


class PromptRange(NamedTuple):
    """Tokens [start, stop) of a prompt: their logits are at the rows before them."""

    sequence: int  # index among the plan's sequences
    slot: int
    start: int
    stop: int
    num_best: int


class PromptTensors(NamedTuple):
    """`PromptScores` on the device."""

    start: int
    token_ids: Tensor
    logprobs: Tensor
    ranks: Tensor

    def to_scores(self) -> PromptScores:
        """Of tensors on the host."""
        return PromptScores(self.start, self.token_ids.numpy(), self.logprobs.numpy(), self.ranks.numpy())


class PromptTable:
    """What the requests in the runner's slots want of their prompts."""

    def __init__(self, num_slots: int) -> None:
        self._counts = np.full(num_slots, -1, dtype=np.int64)
        self._lengths = np.zeros(num_slots, dtype=np.int64)
        self._num_wanting = 0

    def start(self, slot: int, num_best: int | None, num_prompt_tokens: int) -> None:
        self._num_wanting += (num_best is not None) - int(self._counts[slot] >= 0)
        self._counts[slot], self._lengths[slot] = -1 if num_best is None else num_best, num_prompt_tokens

    def ranges(self, slots: Int64Array, starts: Int64Array, stops: Int64Array) -> list[PromptRange]:
        """The tokens whose logits a step computes that runs tokens [start, stop) of these slots."""
        if not self._num_wanting:
            return []
        found = []
        for sequence in np.flatnonzero(self._counts[slots] >= 0).tolist():
            slot = int(slots[sequence])
            first, last = int(starts[sequence]) + 1, min(int(stops[sequence]) + 1, int(self._lengths[slot]))
            if first < last:
                found.append(PromptRange(sequence, slot, first, last, int(self._counts[slot])))
        return found


def scores_of(logits: Tensor, token_ids: Tensor, num_best: int) -> tuple[Tensor, Tensor, Tensor]:
    """`PromptTensors` without their start. logits: [n, vocab] float32; token_ids: [n] int64."""
    every = torch.arange(len(token_ids), device=logits.device)
    values, ids = logprobs_of(Wanted(every, logits, num_best), token_ids)
    ranks = 1 + (logits > logits.gather(-1, token_ids[:, None])).sum(dim=-1)
    return ids, values, ranks
