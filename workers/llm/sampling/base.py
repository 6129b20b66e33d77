"""The contract of a processor: one rule about the next token, for the requests that use it.

    start(slot, params, tokens) → apply(logits, rows) → accept(slots, token_ids) → apply …

A processor keeps its state by slot. Requests that do not use it never appear in its `rows` or `slots`. It
works on the device, the same on every rank, and accepts a token in the step that chose it.

A rule that needs tokens on the host (a grammar) is a matcher instead: see `matching.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.sampling import SamplingParams
from workers.llm.sampling.tokens import TokensSoFar
from workers.nn.loader import to_device

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class Setup(NamedTuple):
    """The arguments of a processor."""

    num_slots: int
    vocab_size: int
    eos_token_ids: Sequence[int]
    device: torch.device


class LogitRows(NamedTuple):
    """The rows of a step's logits that a processor changes."""

    places: Int64Array  # [n]: indices of rows of the logits
    slots: Int64Array  # [n]
    numbers: Int64Array  # [n]: output tokens of the request so far, over all attempts


class Processor(Protocol):
    def __init__(self, setup: Setup) -> None: ...

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        """A request takes the slot; drops its earlier state. Whether the request uses this processor."""
        ...

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        """Changes these rows of logits [num_rows, vocab] float32, in place."""
        ...

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        """Takes the tokens [n] int64 chosen for these slots, on the device."""
        ...


class Entries(NamedTuple):
    """Values that are added to the logits of some tokens of one row."""

    token_ids: Int64Array  # [n]
    values: Float32Array  # [n]


def add_entries(logits: Tensor, places: Int64Array, entries: Sequence[Entries]) -> None:
    """Adds each row's entries to the row of logits at its place. A repeated token gets its last value."""
    token_ids = np.concatenate([entry.token_ids for entry in entries])
    values = np.concatenate([entry.values for entry in entries])
    rows = np.repeat(places, [len(entry.token_ids) for entry in entries])
    where = to_device(rows, logits.device), to_device(token_ids, logits.device)
    logits[where] += to_device(values, logits.device)
