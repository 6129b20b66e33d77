"""The states of one rank's layers, by slot, and the slots of a step's sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.llm.cache.spec import State


class StepStates(NamedTuple):
    """For layers that keep a state: they read and write `tensors[number][slots]` of the step's sequences."""

    tensors: Sequence[Tensor]  # one for each state of the decoder's spec: [num_slots + 1, *shape]
    slots: Tensor  # [num_sequences] int64; only the spare slot may repeat
    counts: Sequence[int] | None  # tokens of each sequence, concatenated; None: one each


class StateTensors:
    """`num_slots` slots and a spare one for the padding rows of a batch."""

    def __init__(self, states: Sequence[State], num_slots: int, device: torch.device) -> None:
        self.tensors: list[Tensor] = []
        for state in states:
            shape = (num_slots + 1, *state.shape)
            self.tensors.append(torch.zeros(shape, dtype=state.dtype, device=device))

    def start(self, slot: int) -> None:
        """Zeroes the slot for a new sequence."""
        for tensor in self.tensors:
            tensor[slot].zero_()

    def of_step(self, slots: Tensor, counts: Sequence[int] | None) -> StepStates | None:
        """`slots` and `counts` as in `StepStates`; None: no layer keeps a state.

        Without counts everything is on the device, as a CUDA graph needs it.
        """
        return StepStates(self.tensors, slots, counts) if self.tensors else None
