"""The states of one rank's layers, by slot, and the slots of a step's sequences."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.llm.cache.spec import State
from workers.nn.native import huge_pages

ALIGNMENT = 64  # bytes: a vector of the widest instructions


class StepStates(NamedTuple):
    """For layers that keep a state: they read and write `tensors[number][slots]` of the step's sequences."""

    tensors: Sequence[Tensor]  # one for each state of the decoder's spec: [num_rows, *shape]
    slots: Tensor  # [num_sequences] int64; only the spare slot may repeat
    counts: Sequence[int] | None  # tokens of each sequence, concatenated; None: one each
    starts: Sequence[int] | None  # tokens of each sequence before this step; None where counts are
    # By sequence: its last tokens are so many drafts, and the state behind each goes to such a row of the
    # tensors, not to the slot. None: there are no drafts.
    drafts: Sequence[range] | None = None
    # By sequence: tokens of its part, fewer than all, and the row of the tensors to which the state behind
    # them is copied. Ascending. None: nothing is copied.
    saves: Sequence[Sequence[tuple[int, int]]] | None = None


class StateTensors:
    """`num_slots` slots and a spare one for the padding rows of a batch; behind them, rows for drafts, and
    those of the snapshots.

    All states of a row lie side by side, so that they are zeroed, or copied to another row, at once.

    A state cannot go back behind a wrong draft. So a step leaves the state behind each draft in a row of its
    own, and the slot has that behind its last token which is no draft, until drafts are accepted.
    """

    def __init__(
        self,
        states: Sequence[State],
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        num_snapshots: int = 0,
        num_drafts: int = 0,
    ) -> None:
        """`dtype`: the model's. `num_drafts`: of a step, at most."""
        sizes = [-(-state.nbytes(dtype) // ALIGNMENT) * ALIGNMENT for state in states]
        self._first_draft = num_slots + 1
        self._first_snapshot = self._first_draft + num_drafts
        num_rows = self._first_snapshot + num_snapshots
        self._rows = torch.empty(num_rows, sum(sizes), dtype=torch.uint8, device=device)
        self._rows[: self._first_snapshot].zero_()  # a snapshot is written before it is read
        self._drafts: dict[int, range] = {}  # of the last step: the rows of its drafts, by slot
        if sizes and device.type == "cpu":
            huge_pages.advise(self._rows.data_ptr(), self._rows.nbytes)
        self.tensors: list[Tensor] = []
        for state, part in zip(states, self._rows.split(sizes, dim=1) if sizes else (), strict=True):
            values = part[:, : state.nbytes(dtype)].view(state.dtype or dtype)
            self.tensors.append(values.unflatten(1, state.shape))

    def start(self, slot: int) -> None:
        """Zeroes the slot for a new sequence."""
        self._rows[slot].zero_()

    def save(self, slot: int, place: int, num_drafts: int = 0) -> None:
        """Copies the slot, or the state behind so many drafts of the last step, to a place of the snapshots.
        To be called before any of these drafts is accepted."""
        row = self._drafts[slot][num_drafts - 1] if num_drafts else slot
        self._rows[self._first_snapshot + place].copy_(self._rows[row])

    def restore(self, slot: int, place: int) -> None:
        """Copies a snapshot to the slot, for a new sequence."""
        self._rows[slot].copy_(self._rows[self._first_snapshot + place])

    def place_drafts(self, slots: Sequence[int], counts: Sequence[int]) -> Sequence[range]:
        """The rows of the next step's drafts, of which a slot has so many."""
        stops = itertools.accumulate(counts, initial=self._first_draft)
        placed = [range(start, stop) for start, stop in itertools.pairwise(stops)]
        assert not self.tensors or placed[-1].stop <= self._first_snapshot, "a step has more drafts than rows"
        self._drafts = dict(zip(slots, placed, strict=True))
        return placed

    def accept(self, slot: int, num_drafts: int) -> None:
        """So many of its drafts of the last step were right: the slot goes on behind them."""
        if self.tensors:
            self._rows[slot].copy_(self._rows[self._drafts[slot][num_drafts - 1]])

    def of_step(
        self,
        slots: Tensor,
        counts: Sequence[int] | None,
        starts: Sequence[int] | None,
        drafts: Sequence[range] | None = None,
        saves: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> StepStates | None:
        """Arguments as in `StepStates`, `saves` with places of the snapshots; None: no layer keeps a state.

        Without counts everything is on the device, as a CUDA graph needs it.
        """
        if not self.tensors:
            return None
        first, copies = self._first_snapshot, None
        if any(saves):
            copies = [[(stop, first + place) for stop, place in of_sequence] for of_sequence in saves]
        return StepStates(self.tensors, slots, counts, starts, drafts, copies)
