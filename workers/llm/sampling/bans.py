"""`bad_words`: a sequence of tokens that must not come is never finished. Its last token cannot be chosen
where the tokens before it have just come."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Int64Array, LogitRows, Setup
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device

ANY = -1  # a place before a short sequence: whatever came there


class Bans:
    """Keeps the last output tokens on the device, so that a step need not wait for the token of the step
    before."""

    def __init__(self, setup: Setup) -> None:
        self._vocab_size, self._device = setup.vocab_size, setup.device
        # By slot: sequences [n, length] without their last tokens, behind `ANY`s; the last tokens [n]; and
        # the output's last tokens [length].
        self._before: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}
        self._recent: dict[int, Tensor] = {}

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        sequences = [unpack_int32(one).tolist() for one in params.banned_token_ids]
        sequences = [one for one in sequences if one and max(one) < self._vocab_size]
        if not sequences:
            return False
        length = max(map(len, sequences)) - 1
        before = np.full((len(sequences), length), ANY, dtype=np.int64)
        for row, one in zip(before, sequences, strict=True):
            row[length - len(one) + 1 :] = one[:-1]
        recent = np.full(length, ANY - 1, dtype=np.int64)  # no token
        if length and len(known := tokens.output[-length:]):
            recent[-len(known) :] = known
        self._before[slot] = to_device(before, self._device)
        self._last[slot] = to_device(np.array([one[-1] for one in sequences]), self._device)
        self._recent[slot] = to_device(recent, self._device)
        return True

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        for place, slot in zip(rows.places.tolist(), rows.slots.tolist(), strict=True):
            before, last, row = self._before[slot], self._last[slot], logits[place]
            is_next = ((before == self._recent[slot]) | (before == ANY)).all(dim=-1)
            # By the lowest value: one token may end several sequences, of which only some are at their end.
            ban = torch.where(is_next, -torch.inf, torch.inf)
            row.scatter_reduce_(0, last, ban, "amin")

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        for slot, token_id in zip(slots.tolist(), token_ids, strict=True):
            if len(recent := self._recent[slot]):
                self._recent[slot] = torch.cat([recent[1:], token_id[None]])
