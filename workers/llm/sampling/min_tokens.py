"""`min_tokens`: until a request has so many output tokens, no token that ends it can be chosen."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Entries, Int64Array, LogitRows, Setup, add_entries
from workers.llm.sampling.tokens import TokensSoFar


class MinTokens:
    def __init__(self, setup: Setup) -> None:
        self._vocab_size, self._eos_token_ids = setup.vocab_size, tuple(setup.eos_token_ids)
        self._min_tokens = np.zeros(setup.num_slots, dtype=np.int64)
        self._bans: dict[int, Entries] = {}  # by slot

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        ends = {token for token in (*self._eos_token_ids, *params.stop_token_ids) if token < self._vocab_size}
        self._bans[slot] = Entries(
            np.fromiter(ends, dtype=np.int64, count=len(ends)), np.full(len(ends), -np.inf, dtype=np.float32)
        )
        self._min_tokens[slot] = params.min_tokens
        return params.min_tokens > 0

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        is_early = rows.numbers < self._min_tokens[rows.slots]
        if is_early.any():
            bans = [self._bans[slot] for slot in rows.slots[is_early].tolist()]
            add_entries(logits, rows.places[is_early], bans)

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        """The number of output tokens comes with `LogitRows`."""
