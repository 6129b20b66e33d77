"""What a processor is: one rule about the next token, for the requests that ask for it.

    start(slot, params, tokens) → apply(logits, rows) → accept(slots, token_ids) → apply …

A processor keeps its state by slot, and a request that asks nothing of a processor never appears in its
`rows` or `slots`: it is not touched, and costs nothing.

Most processors go by what is on the device, and are told of a chosen token in the step that chose it. A
processor that `needs_tokens` on the host (a grammar, whose matcher is a data structure of the host) is told
by `Sampler.accept` when the token has arrived there, between two steps. The forward of the next step may run
meanwhile. Only the choice of its tokens waits, for the requests that `Sampler.waits_for_tokens` names. Where
several ranks choose the same tokens, rank 0 alone runs matchers and the plan carries masks: on the other
ranks such a processor is given the masks and has no matcher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.messages import Int32Array
from pipeline.wire.sampling import SamplingParams
from workers.nn.loader import to_device

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class Setup(NamedTuple):
    """What processors are made for."""

    num_slots: int
    vocab_size: int
    eos_token_ids: Sequence[int]
    device: torch.device


class Tokens(NamedTuple):
    """What a request has when it takes its slot."""

    prompt: Int32Array
    output: Int32Array  # of all attempts, and of before a preemption


class Rows(NamedTuple):
    """The rows of a step's logits that a processor is to change."""

    places: Int64Array  # [n]: which rows of the logits
    slots: Int64Array  # [n]
    numbers: Int64Array  # [n]: output tokens that the request has, over all attempts


class Processor(Protocol):
    def __init__(self, setup: Setup) -> None: ...

    @property
    def needs_tokens(self) -> bool:
        """Whether it must be told of a token on the host before it can change the next logits."""
        ...

    def start(self, slot: int, params: SamplingParams, tokens: Tokens) -> bool:
        """A request takes the slot, and what the slot held is forgotten.

        Whether the request asks for anything.
        """
        ...

    def apply(self, logits: Tensor, rows: Rows) -> None:
        """Changes these rows of logits [num_rows, vocab] float32, in place."""
        ...

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        """The tokens [n] int64 chosen for these slots: on the device, or on the host if it `needs_tokens`."""
        ...


class Entries(NamedTuple):
    """What is added to the logits of some tokens of one row."""

    token_ids: Int64Array  # [n]
    values: Float32Array  # [n]


def add_entries(logits: Tensor, places: Int64Array, entries: Sequence[Entries]) -> None:
    """Adds one row's entries to the row of logits at each place.

    A token that is named twice gets its last value.
    """
    token_ids = np.concatenate([entry.token_ids for entry in entries])
    values = np.concatenate([entry.values for entry in entries])
    rows = np.repeat(places, [len(entry.token_ids) for entry in entries])
    where = to_device(rows, logits.device), to_device(token_ids, logits.device)
    logits[where] += to_device(values, logits.device)
