"""Presence, frequency and repetition penalties: earlier tokens become less likely."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipeline.wire.packing import Int32Array
from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.base import Float32Array, Int64Array, LogitRows, Setup
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device


class Penalties:
    """Counts tokens on the device, so that a step need not wait for the token of the step before."""

    def __init__(self, setup: Setup) -> None:
        self._num_slots, self._vocab_size, self._device = setup.num_slots, setup.vocab_size, setup.device
        self._presence = np.zeros(setup.num_slots, dtype=np.float32)
        self._frequency = np.zeros(setup.num_slots, dtype=np.float32)
        self._repetition = np.ones(setup.num_slots, dtype=np.float32)
        # Allocated at the first request with a penalty: [num_slots, vocab] is large.
        self._counts: Tensor | None = None  # [num_slots, vocab] int32: of output tokens
        self._is_in_prompt: Tensor | None = None  # [num_slots, vocab] bool

    @staticmethod
    def _are_asked(params: SamplingParams) -> bool:
        has_penalty = bool(params.presence_penalty or params.frequency_penalty)
        return has_penalty or params.repetition_penalty != 1

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        if not self._are_asked(params):
            return False
        self._presence[slot], self._frequency[slot] = params.presence_penalty, params.frequency_penalty
        self._repetition[slot] = params.repetition_penalty
        if self._counts is None or self._is_in_prompt is None:
            shape = self._num_slots, self._vocab_size
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._is_in_prompt = torch.zeros(shape, dtype=torch.bool, device=self._device)
        self._is_in_prompt[slot].zero_().index_fill_(0, self._on_device(tokens.prompt), True)
        output = self._on_device(tokens.output)
        self._counts[slot].zero_().scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        return True

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        assert self._counts is not None
        assert self._is_in_prompt is not None
        places, slots = self._on_device(rows.places), self._on_device(rows.slots)
        counts, changed = self._counts[slots], logits[places]
        is_in_output = counts > 0
        factor = torch.where(
            self._is_in_prompt[slots] | is_in_output, self._column(self._repetition, rows), 1.0
        )
        changed = torch.where(changed > 0, changed / factor, changed * factor)
        changed -= self._column(self._frequency, rows) * counts
        changed -= self._column(self._presence, rows) * is_in_output
        logits[places] = changed

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        assert self._counts is not None
        ones = torch.ones_like(token_ids, dtype=torch.int32)
        self._counts.index_put_((self._on_device(slots), token_ids), ones, accumulate=True)

    def _on_device(self, values: Int64Array | Int32Array) -> Tensor:
        return to_device(values.astype(np.int64), self._device)

    def _column(self, by_slot: Float32Array, rows: LogitRows) -> Tensor:
        return to_device(by_slot[rows.slots], self._device)[:, None]
