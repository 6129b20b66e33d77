"""`thinking_budget`: after so many output tokens a thought that goes on is ended by its end tag."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.sampling import MAX_THINKING_END, SamplingParams
from workers.llm.sampling.base import Int64Array, LogitRows, Setup
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device

NO_TOKEN = -1


class ThinkingBudget:
    """Follows the end tag on the device, so that a step need not wait for the token of the step before."""

    def __init__(self, setup: Setup) -> None:
        self._device = setup.device
        shape = setup.num_slots, MAX_THINKING_END
        self._budgets = np.zeros(setup.num_slots, dtype=np.int64)
        self._lengths = np.zeros(setup.num_slots, dtype=np.int64)
        self._ends = np.full(shape, NO_TOKEN, dtype=np.int64)
        # How many tokens of the tag the output ends with; all of them, once it has had the whole tag.
        self._num_matched = torch.zeros(setup.num_slots, dtype=torch.int64, device=setup.device)

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        end = params.thinking_end
        if params.thinking_budget is None or not end:
            return False
        self._budgets[slot], self._lengths[slot] = params.thinking_budget, len(end)
        self._ends[slot] = NO_TOKEN
        self._ends[slot, : len(end)] = end
        matched = 0
        for token in tokens.output.tolist():
            matched = _matched(matched, token, end)
        self._num_matched[slot] = matched
        return True

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        """The tag's tokens follow each other from the budget on: which one comes is known without the
        tokens before."""
        index = rows.numbers - self._budgets[rows.slots]
        is_due = (index >= 0) & (index < self._lengths[rows.slots])
        if not is_due.any():
            return
        slots = rows.slots[is_due]
        places, forced = (
            self._on_device(rows.places[is_due]),
            self._on_device(self._ends[slots, index[is_due]]),
        )
        is_open = self._num_matched[self._on_device(slots)] < self._on_device(self._lengths[slots])
        only = torch.full((len(slots), logits.shape[-1]), -torch.inf, device=self._device)
        only.scatter_(1, forced[:, None], 0.0)
        logits[places] = torch.where(is_open[:, None], only, logits[places])

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        where, lengths = self._on_device(slots), self._on_device(self._lengths[slots])
        ends, matched = self._on_device(self._ends[slots]), self._num_matched[where]
        awaited = ends.gather(1, matched.clamp(max=MAX_THINKING_END - 1)[:, None])[:, 0]
        again = (token_ids == ends[:, 0]).long()
        grown = torch.where(token_ids == awaited, matched + 1, again)
        self._num_matched[where] = torch.where(matched >= lengths, matched, grown)

    def _on_device(self, values: Int64Array) -> Tensor:
        return to_device(values, self._device)


def _matched(matched: int, token: int, end: tuple[int, ...]) -> int:
    """As `accept`, on the host."""
    if matched == len(end):
        return matched
    return matched + 1 if token == end[matched] else int(token == end[0])
