"""The states of one rank's layers, by slot, and the slots of a step's sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.llm.cache.spec import State
from workers.nn.native import huge_pages

ALIGNMENT = 64  # bytes: a vector of the widest instructions


class StepStates(NamedTuple):
    """For layers that keep a state: they read and write `tensors[number][slots]` of the step's sequences."""

    tensors: Sequence[Tensor]  # one for each state of the decoder's spec: [num_slots + 1, *shape]
    slots: Tensor  # [num_sequences] int64; only the spare slot may repeat
    counts: Sequence[int] | None  # tokens of each sequence, concatenated; None: one each
    starts: Sequence[int] | None  # tokens of each sequence before this step; None where counts are


class StateTensors:
    """`num_slots` slots and a spare one for the padding rows of a batch.

    All states of a slot lie side by side, so that they are zeroed, or copied to another slot, at once.
    """

    def __init__(
        self,
        states: Sequence[State],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        num_snapshots: int = 0,
    ) -> None:
        """`dtype`: the model's."""
        sizes = [-(-state.nbytes(dtype) // ALIGNMENT) * ALIGNMENT for state in states]
        self._slots = torch.zeros(num_slots + 1, sum(sizes), dtype=torch.uint8, device=device)
        # Not zeroed: a place is written before it is read.
        self._snapshots = torch.empty(num_snapshots, sum(sizes), dtype=torch.uint8, device=device)
        if sizes and device.type == "cpu":
            huge_pages.advise(self._slots.data_ptr(), self._slots.nbytes)
        self.tensors: list[Tensor] = []
        for state, part in zip(states, self._slots.split(sizes, dim=1) if sizes else (), strict=True):
            values = part[:, : state.nbytes(dtype)].view(state.dtype or dtype)
            self.tensors.append(values.unflatten(1, state.shape))

    def start(self, slot: int) -> None:
        """Zeroes the slot for a new sequence."""
        self._slots[slot].zero_()

    def save(self, slot: int, place: int) -> None:
        """Copies the slot to a place of the snapshots."""
        self._snapshots[place].copy_(self._slots[slot])

    def restore(self, slot: int, place: int) -> None:
        """Copies a snapshot to the slot, for a new sequence."""
        self._slots[slot].copy_(self._snapshots[place])

    def of_step(
        self, slots: Tensor, counts: Sequence[int] | None, starts: Sequence[int] | None
    ) -> StepStates | None:
        """Arguments as in `StepStates`; None: no layer keeps a state.

        Without counts everything is on the device, as a CUDA graph needs it.
        """
        return StepStates(self.tensors, slots, counts, starts) if self.tensors else None
