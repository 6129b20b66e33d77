"""`allowed_token_ids`: no other token can be chosen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Int64Array, LogitRows, Setup
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device


class AllowedTokens:
    def __init__(self, setup: Setup) -> None:
        self._vocab_size, self._device = setup.vocab_size, setup.device
        self._others: dict[int, Tensor] = {}  # by slot: [vocab] bool, of the tokens that are not allowed

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        if params.allowed_token_ids is None:
            self._others.pop(slot, None)
            return False
        others = np.ones(self._vocab_size, dtype=np.bool_)
        others[list(params.allowed_token_ids)] = False
        self._others[slot] = to_device(others, self._device)
        return True

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        for place, slot in zip(rows.places.tolist(), rows.slots.tolist(), strict=True):
            logits[place].masked_fill_(self._others[slot], -torch.inf)

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        """What is allowed does not depend on earlier tokens."""
