"""The inputs of a step's tokens, all sequences side by side. `ends`: of the sequences, among these tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workers.llm.attention.base import SequencePart
from workers.llm.sequences import Int64Array, SequenceTable, StepRows
from workers.nn.loader import to_device


def token_ids_of(rows: StepRows, ends: Int64Array, sequences: SequenceTable, last_tokens: Tensor) -> Tensor:
    """[num_tokens] int64: token ids that the host knows; for a decode, the last token on the device, of
    `last_tokens` by slot."""
    token_ids = np.zeros(ends[-1], dtype=np.int64)
    stops, begins_on_device = rows.stops, rows.are_decodes.copy()
    for row in np.flatnonzero(~rows.are_decodes).tolist():
        slot, start, stop, end = rows.slots[row], rows.starts[row], stops[row], ends[row]
        if (drafts := rows.drafts.get(row)) is not None:
            begins_on_device[row] = True
            token_ids[end - len(drafts) : end] = drafts
        else:
            token_ids[end - rows.counts[row] : end] = sequences.token_ids(slot, start, stop)
    device = last_tokens.device
    on_device = to_device(token_ids, device)
    if begins_on_device.any():
        last = last_tokens[to_device(rows.slots[begins_on_device], device)]
        on_device[to_device((ends - rows.counts)[begins_on_device], device)] = last
    return on_device


def positions_of(
    rows: StepRows, ends: Int64Array, sequences: SequenceTable, device: torch.device
) -> Tensor:  # fmt: skip
    """[3, num_tokens] int64"""
    positions = np.empty((3, ends[-1]), dtype=np.int64)
    # For a decode all three rows are equal.
    of_decodes = rows.starts + sequences.position_deltas[rows.slots]
    positions[:, ends[rows.are_decodes] - 1] = of_decodes[rows.are_decodes]
    for row in np.flatnonzero(~rows.are_decodes):
        slot, start, count = rows.slots[row], rows.starts[row], rows.counts[row]
        positions[:, ends[row] - count : ends[row]] = sequences.positions(slot, start, start + count)
    return to_device(positions, device)


def spans_of(rows: StepRows, sequences: SequenceTable) -> list[SequencePart]:
    slots, starts, counts = rows.slots.tolist(), rows.starts.tolist(), rows.counts.tolist()
    return [
        SequencePart(count, start, sequences.block_table(slot))
        for slot, start, count in zip(slots, starts, counts, strict=True)
    ]
