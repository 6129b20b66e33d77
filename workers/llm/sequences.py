"""A rank's state of the running sequences, by slot, so that a step brings only what is new. No torch.

    start(…) → rows(steps) → advance(rows) → the step is computed → rows(steps) → …

A step reads tokens that the host knows (of the prompt, or of an earlier attempt, or drafts) or the token that
was sampled last, which may be on the device only. A draft counts as computed once it has proved right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.wire.packing import Int32Array, unpack_int32
from pipeline.wire.steps import SequenceStart, SequenceStep

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
NO_ADAPTER = -1


class StepRows(NamedTuple):
    """The sequences of a step, side by side; all arrays are on the host, one number a sequence."""

    slots: Int64Array
    starts: Int64Array  # tokens before this step
    counts: Int64Array  # tokens of this step, drafts included
    are_sampled: BoolArray
    are_decodes: BoolArray  # one text token, sampled; the device has it as the slot's last token
    # By row, of decodes with drafts: these are behind a token that the device has as the slot's last one.
    drafts: Mapping[int, Int32Array]

    @property
    def stops(self) -> Int64Array:
        """Tokens with this step, without drafts."""
        stops = self.starts + self.counts
        for row, drafts in self.drafts.items():
            stops[row] -= len(drafts)
        return stops


class SequenceTable:
    """`num_slots` slots and a spare one for the padding rows of a batch."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.spare_slot = num_slots
        self.block_tables = np.zeros((num_slots + 1, max_blocks), dtype=np.int32)
        self.num_blocks = np.zeros(num_slots + 1, dtype=np.int64)
        self.lengths = np.zeros(num_slots + 1, dtype=np.int64)  # tokens computed, or being computed
        self.position_deltas = np.zeros(num_slots + 1, dtype=np.int64)
        self.adapters = np.full(num_slots + 1, NO_ADAPTER, dtype=np.int64)  # by number
        # From this index on the device has all that a decode needs: the last token known at the start, or the
        # one after it if that token is no text.
        self._decodes_from = np.zeros(num_slots + 1, dtype=np.int64)
        self._token_ids = [np.zeros(0, dtype=np.int32)] * num_slots  # known at the start
        self._positions: list[Int32Array | None] = [None] * num_slots  # [3, prompt]; None: of text alone

    def start(self, start: SequenceStart) -> None:
        slot, token_ids = start.slot, unpack_int32(start.token_ids)
        positions = unpack_int32(start.positions).reshape(3, -1) if start.positions else None
        self._token_ids[slot], self._positions[slot] = token_ids, positions
        self.lengths[slot], self.num_blocks[slot] = start.num_computed_tokens, 0
        self.position_deltas[slot], self.adapters[slot] = start.position_delta, start.adapter
        self.extend(slot, unpack_int32(start.block_table))
        last = len(token_ids) - 1
        is_text = positions is None or last >= positions.shape[1]
        if positions is not None and not is_text:
            is_text = bool((positions[:, last] == last + start.position_delta).all())
        self._decodes_from[slot] = last if is_text else last + 1

    def extend(self, slot: int, blocks: Int32Array) -> None:
        """Appends blocks to the sequence's table."""
        count = self.num_blocks[slot]
        self.block_tables[slot, count : count + len(blocks)] = blocks
        self.num_blocks[slot] = count + len(blocks)

    def rows(self, steps: Sequence[SequenceStep]) -> StepRows:
        """The rows of a step. Adds the step's new blocks to the tables."""
        count = len(steps)
        slots = np.fromiter([step.slot for step in steps], dtype=np.int64, count=count)
        counts = np.fromiter([step.num_tokens for step in steps], dtype=np.int64, count=count)
        are_sampled = np.fromiter([step.is_sampled for step in steps], dtype=np.bool_, count=count)
        for step in steps:
            if step.new_blocks:
                self.extend(step.slot, unpack_int32(step.new_blocks))
        starts = self.lengths[slots]
        are_decodes = are_sampled & (counts == 1) & (starts >= self._decodes_from[slots])
        drafts: dict[int, Int32Array] = {}
        for row, step in enumerate(steps):
            if step.embeddings:
                are_decodes[row] = False
            if step.drafts:
                drafts[row] = unpack_int32(step.drafts)
        return StepRows(slots, starts, counts, are_sampled, are_decodes, drafts)

    def advance(self, rows: StepRows) -> None:
        """Counts the step's tokens as computed: the step is in flight. Its drafts follow by `accept`."""
        self.lengths[rows.slots] = rows.stops

    def accept(self, slots: Int64Array) -> None:
        """Counts one more draft of each of these slots as computed."""
        self.lengths[slots] += 1

    def token_ids(self, slot: int, start: int, stop: int) -> Int32Array:
        """Tokens [start, stop), which the host knew when the sequence started."""
        found = self._token_ids[slot][start:stop]
        assert len(found) == stop - start, "a token that is to be computed is not known"
        return found

    def adapters_of(self, rows: StepRows) -> Int64Array:
        """[num_tokens]: of each token of a step, by number."""
        return np.repeat(self.adapters[rows.slots], rows.counts)

    def positions(self, slot: int, start: int, stop: int) -> Int32Array:
        """M-RoPE positions [3, stop - start]; behind the prompt all rows are the index plus the delta."""
        of_prompt = self._positions[slot]
        num_prompt = 0 if of_prompt is None else of_prompt.shape[1]
        behind = np.arange(max(start, num_prompt), max(stop, num_prompt), dtype=np.int32)
        behind += np.int32(self.position_deltas[slot])
        rows = np.broadcast_to(behind, (3, len(behind)))
        return rows if of_prompt is None else np.concatenate([of_prompt[:, start:stop], rows], axis=1)

    def block_table(self, slot: int) -> Int32Array:
        return self.block_tables[slot, : self.num_blocks[slot]]
