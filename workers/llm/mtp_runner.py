"""Runs the decoder's head that predicts a further token: behind every step, and to guess the next tokens.

The head has keys and values of its own, one entry for each pair of a token and the one behind it. A step
computes the pairs of its tokens once the tokens behind them are known. The last token of a part of a prompt
waits for the next part, with its hidden state. Guesses are made one after another, each from the one before,
and without drawing: the entries of these pairs are overwritten by the next step, which knows better.

A prefix from the cache lacks its last pair: its hidden state is not there any more, and the token behind it
may have been another one. The entry that is found there is that of another request, or zero. This costs a
little of what the head knows, and nothing of the text.

    keep(step) → its tokens are chosen → guess(launched) → keep(step) → …
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.llm.attention.base import AttentionBackend, SequencePart
from workers.llm.models.base import Decoder
from workers.llm.sequences import Int64Array, SequenceTable, StepRows
from workers.llm.step_result import LaunchedStep
from workers.nn.loader import to_device


class KeptStep(NamedTuple):
    """A step whose tokens are being chosen."""

    rows: StepRows
    ends: Int64Array  # of the sequences, among the step's tokens
    num_guesses: Sequence[int]  # by sequence
    x: Tensor | None  # [num_tokens, hidden], the embedded tokens; None: each sequence has one, and is sampled
    hidden: Tensor  # [num_tokens, hidden], what the decoder made of them


class _Part(NamedTuple):
    """The pairs of a sequence of the step, which lie side by side."""

    row: int
    slot: int
    place: int  # of the first pair's first token in the sequence
    firsts: Sequence[int]  # rows of the hidden states: of the step's tokens, then of those that have waited
    seconds: Sequence[int]  # rows of the embedded tokens: of the step's, then of those that it has yielded


class MtpRunner:
    def __init__(self, decoder: Decoder, sequences: SequenceTable, attention: AttentionBackend) -> None:
        """`attention` has the head's paged layer as its last one."""
        assert decoder.mtp is not None
        self._decoder, self._head = decoder, decoder.mtp
        self._sequences, self._attention = sequences, attention
        # What no request has written is found behind a cached prefix, and must be numbers.
        attention.cache.zero(-1)
        num_slots = len(sequences.lengths)
        shape = num_slots, decoder.info.hidden_size
        self._hidden = torch.zeros(shape, dtype=decoder.dtype, device=attention.cache.device)
        # By slot: whether the last computed token, of this hidden state, waits for the token behind it.
        self._waits = np.zeros(num_slots, dtype=np.bool_)
        self._step: KeptStep | None = None

    def start(self, slot: int) -> None:
        self._waits[slot] = False

    def has_waiting(self, slots: Int64Array) -> bool:
        return bool(self._waits[slots].any())

    def keep(self, step: KeptStep) -> None:
        self._step = step

    def guess(self, launched: LaunchedStep, last_tokens: Tensor) -> None:
        """To be called once all tokens of the step are chosen. Adds the guesses that the plan asks for to the
        results. `last_tokens`: by slot."""
        assert self._step is not None
        step, self._step = self._step, None
        parts = [part for part in self._parts(step) if part.firsts]
        # As backends want it: those with one token first.
        parts.sort(key=lambda part: len(part.firsts) > 1)
        hidden = self._compute(step, parts, last_tokens) if parts else step.hidden
        unsampled = np.flatnonzero(~step.rows.are_sampled)
        if len(unsampled):
            slots, ends = step.rows.slots[unsampled], step.ends[unsampled]
            self._hidden[self._tensor(slots)] = step.hidden[self._tensor(ends - 1)]
        self._waits[step.rows.slots] = ~step.rows.are_sampled
        asking = [index for index, part in enumerate(parts) if step.num_guesses[part.row]]
        if not asking:
            return
        stops = np.cumsum([len(part.firsts) for part in parts])
        places = {row: place for place, row in enumerate(np.flatnonzero(step.rows.are_sampled).tolist())}
        those = [parts[index] for index in asking]
        self._go_on(
            launched,
            [places[part.row] for part in those],
            [part.slot for part in those],
            [self._most_guesses(part.slot, step.num_guesses[part.row]) for part in those],
            hidden[self._tensor(stops[asking] - 1)],
        )

    def _parts(self, step: KeptStep) -> Sequence[_Part]:
        rows, found = step.rows, list[_Part]()
        num_known = 0 if step.x is None else int(step.ends[-1])
        num_computed = len(step.hidden)
        num_sampled = 0
        stops, lengths = rows.stops, self._sequences.lengths[rows.slots]
        for row, slot in enumerate(rows.slots.tolist()):
            first = int(step.ends[row] - rows.counts[row])
            # Tokens of the step, accepted drafts included, that another token of the step follows.
            num_inner = int(lengths[row] - rows.starts[row]) - 1
            assert lengths[row] >= stops[row], "drafts are accepted behind the step's own tokens"
            firsts = list(range(first, first + num_inner))
            seconds = [one + 1 for one in firsts]
            waits = bool(self._waits[slot])
            if waits:
                firsts, seconds = [num_computed + row, *firsts], [first, *seconds]
            if rows.are_sampled[row]:
                firsts.append(first + num_inner)
                seconds.append(num_known + num_sampled)
                num_sampled += 1
            found.append(_Part(row, slot, int(rows.starts[row]) - waits, firsts, seconds))
        return found

    def _compute(self, step: KeptStep, parts: Sequence[_Part], last_tokens: Tensor) -> Tensor:
        """The head's hidden states [num_pairs, hidden] of all parts, side by side."""
        slots, sampled = step.rows.slots, step.rows.slots[step.rows.are_sampled]
        known = [] if step.x is None else [step.x]
        if len(sampled):
            known.append(self._decoder.embed(last_tokens[self._tensor(sampled)]))
        hidden = step.hidden
        if self.has_waiting(slots):
            hidden = torch.cat((hidden, self._hidden[self._tensor(slots)]))
        firsts = self._tensor(np.concatenate([part.firsts for part in parts]))
        seconds = self._tensor(np.concatenate([part.seconds for part in parts]))
        spans = [(part.slot, part.place, len(part.firsts)) for part in parts]
        return self._run(torch.cat(known)[seconds], hidden[firsts], spans)

    def _run(self, x: Tensor, hidden: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        """spans: of each sequence its slot, the place of its first pair, and the number of its pairs."""
        positions = [self._sequences.positions(slot, place, place + count) for slot, place, count in spans]
        planned = self._attention.plan(
            [SequencePart(count, place, self._sequences.block_table(slot)) for slot, place, count in spans]
        )
        return self._head(x, hidden, self._tensor(np.concatenate(positions, axis=1)), planned)

    def _most_guesses(self, slot: int, count: int) -> int:
        """Of `count` guesses, those for which the sequence has blocks: one more than it has places left."""
        capacity = int(self._sequences.num_blocks[slot]) * self._attention.cache.block_size
        return min(count, 1 + max(0, capacity - int(self._sequences.lengths[slot])))

    def _go_on(
        self,
        launched: LaunchedStep,
        places: Sequence[int],
        slots: Sequence[int],
        counts: Sequence[int],
        hidden: Tensor,
    ) -> None:
        """Makes `counts` guesses for these sequences, from the hidden states of their last pairs. All ranks
        make the same."""
        lengths = self._sequences.lengths
        which = list(range(len(slots)))
        token_ids = self._decoder.logits(hidden).argmax(dim=-1)
        launched.add_guesses(places, token_ids)
        for number in range(1, max(counts)):
            left = [index for index, one in enumerate(which) if counts[one] > number]
            kept, which = self._tensor(np.array(left)), [which[index] for index in left]
            spans = [(slots[one], int(lengths[slots[one]]) + number - 1, 1) for one in which]
            hidden = self._run(self._decoder.embed(token_ids[kept]), hidden[kept], spans)
            token_ids = self._decoder.logits(hidden).argmax(dim=-1)
            launched.add_guesses([places[one] for one in which], token_ids)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return to_device(values.astype(np.int64, copy=False), self._hidden.device)
