"""The sequences of a step whose tokens are to be chosen, and the logits for it.

A decode with drafts has one more row of logits for each of them. Its tokens are chosen one after another, as
a decode without drafts would have chosen them, up to the first that differs from its draft: so every rule
about the next token sees the tokens before it.

    unchosen → token_ids are chosen for its `next_logits` → unchosen.behind(token_ids) → … until it is empty
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from pipeline.wire.packing import Int32Array
from workers.llm.sequences import Int64Array, StepRows
from workers.nn.loader import to_device


class Unchosen(NamedTuple):
    places: Int64Array  # among the step's sampled sequences
    slots: Int64Array
    num_tokens: Int64Array  # of each sequence so far
    rows: Int64Array  # of the logits, for each sequence's next token; behind it those for its drafts
    drafts: Mapping[int, Int32Array]  # those that are left, by place, of sequences that have any
    logits: Tensor  # [num_rows, vocab] float32

    @classmethod
    def of(cls, step: StepRows, logits: Tensor) -> Unchosen:
        """All sampled sequences; `logits` has the rows of `logit_rows`."""
        sampled = np.flatnonzero(step.are_sampled)
        places = np.arange(len(sampled))
        if not step.drafts:
            return cls(places, step.slots[sampled], step.stops[sampled], places, {}, logits)
        drafts = {place: step.drafts[row] for place, row in enumerate(sampled.tolist()) if row in step.drafts}
        counts = _counts(step)[sampled]
        rows = np.cumsum(counts) - counts
        return cls(places, step.slots[sampled], step.stops[sampled], rows, drafts, logits)

    def __bool__(self) -> bool:
        return len(self.slots) > 0

    @property
    def next_logits(self) -> Tensor:
        """[n, vocab] float32, of the next token of each sequence."""
        if len(self.rows) == len(self.logits):
            return self.logits
        return self.logits[to_device(self.rows, self.logits.device)]

    def at(self, which: Int64Array) -> Unchosen:
        """Some of the sequences, with a copy of their logits: the next step overwrites those of a graph."""
        places = self.places[which]
        counts = np.array([1 + len(self.drafts.get(place, ())) for place in places.tolist()])
        rows = np.cumsum(counts) - counts
        copied = np.repeat(self.rows[which] - rows, counts) + np.arange(counts.sum())
        logits = self.logits[to_device(copied, self.logits.device)]
        drafts = {place: self.drafts[place] for place in places.tolist() if place in self.drafts}
        return Unchosen(places, self.slots[which], self.num_tokens[which], rows, drafts, logits)

    def behind(self, token_ids: Int64Array) -> Unchosen:
        """The sequences whose next draft is the token that was chosen: `token_ids`, one for each sequence."""
        chosen = zip(self.places.tolist(), token_ids.tolist(), strict=True)
        which = np.array([place in self.drafts and _begins(self.drafts[place], one) for place, one in chosen])
        drafts = {place: self.drafts[place][1:] for place in self.places[which].tolist()}
        return Unchosen(
            self.places[which], self.slots[which], self.num_tokens[which] + 1, self.rows[which] + 1, drafts,
            self.logits,
        )  # fmt: skip


def logit_rows(step: StepRows, ends: Int64Array) -> Int64Array:
    """The tokens of a step behind which one is chosen: the last of each sampled sequence, and those before
    its drafts. `ends`: of the sequences, among the step's tokens."""
    if not step.drafts:
        return ends[step.are_sampled] - 1
    counts = _counts(step)[step.are_sampled]
    starts = ends[step.are_sampled] - counts
    return np.repeat(starts - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def _counts(step: StepRows) -> Int64Array:
    """How many rows of logits each sequence has, if it is sampled."""
    return step.counts - (step.stops - step.starts) + 1


def _begins(drafts: Int32Array, token_id: int) -> bool:
    return len(drafts) > 0 and int(drafts[0]) == token_id
