"""`logit_bias`: adds to the logits of some tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Entries, Int64Array, LogitRows, Setup, add_entries
from workers.llm.sampling.tokens import TokensSoFar


class Bias:
    def __init__(self, setup: Setup) -> None:
        self._entries: dict[int, Entries] = {}  # by slot

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        bias = params.logit_bias
        self._entries[slot] = Entries(
            np.fromiter(bias.keys(), dtype=np.int64, count=len(bias)),
            np.fromiter(bias.values(), dtype=np.float32, count=len(bias)),
        )
        return bool(bias)

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        add_entries(logits, rows.places, [self._entries[slot] for slot in rows.slots.tolist()])

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        """A bias does not depend on earlier tokens."""
