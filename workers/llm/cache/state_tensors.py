"""The states of one rank's layers, by slot, and which rows of a step are whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.llm.cache.spec import State


class StepStates(NamedTuple):
    """For layers that keep a state: they read and write `tensors[number][slots]` of the step's sequences."""

    tensors: Sequence[Tensor]  # one for each state of the decoder's spec: [num_slots + 1, *shape]
    slots: Tensor  # [num_sequences] int64, all different but for the spare one
    counts: Sequence[int] | None  # tokens of each sequence, side by side; None: one each


class StateTensors:
    """`num_slots` slots and one more: that of the rows that fill up a batch."""

    def __init__(self, states: Sequence[State], num_slots: int, device: torch.device) -> None:
        self.tensors: list[Tensor] = []
        for state in states:
            shape = (num_slots + 1, *state.shape)
            self.tensors.append(torch.zeros(shape, dtype=state.dtype, device=device))

    def start(self, slot: int) -> None:
        """Another sequence begins here."""
        for tensor in self.tensors:
            tensor[slot].zero_()

    def of_step(self, slots: Tensor, counts: Sequence[int] | None) -> StepStates | None:
        """`slots` and `counts` as in `StepStates`; None: no layer keeps a state.

        Without counts all is on the device, so that a CUDA graph can hold it.
        """
        return StepStates(self.tensors, slots, counts) if self.tensors else None
