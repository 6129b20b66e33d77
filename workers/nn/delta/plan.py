"""How the tokens of a step are laid out for layers with a delta rule: once a step, for all such layers.

Leading sequences with one token are computed step by step, and so are those with drafts, which follow them:
each of their tokens leaves its states in a row of its own. All others are cut into chunks of at most `CHUNK`
tokens, at multiples of `CHUNK` from the start of the sequence, so that the same tokens are cut alike however
the steps were. The i-th chunks of all sequences are computed together (a round), those of the longest
sequences first: the chunks of a round, and its sequences, lie side by side.

A sequence whose state is to be copied behind some of its tokens is cut there: each piece is computed by a
call of its own, together with the pieces of other sequences that lie beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.nn.loader import to_device
from workers.nn.native.operators import DeltaSequences

CHUNK = 64
# Chunks that are prepared together: so many that operators have enough to do, and so few that their results
# stay in the processor's cache.
MAX_GROUP = 4


# Numbers of rows: a slice where they lie side by side, so that they are not copied.
Rows = slice | Tensor


class InputSources(NamedTuple):
    """Rows that come from the step's tokens or, before a sequence's first token of the step, from what is
    kept of the tokens before it. All int64."""

    places: Tensor  # [m], among all rows, of those from tokens
    tokens: Tensor  # [m]
    kept_places: Tensor  # [n], of those from what is kept
    kept: Tensor  # [n]

    def pick(self, tokens: Tensor, kept: Tensor) -> Tensor:
        """[m + n, channels] of both matrices with so many channels."""
        found = tokens.new_empty(len(self.places) + len(self.kept_places), tokens.shape[1])
        found[self.places] = tokens[self.tokens]
        if len(self.kept_places):
            found[self.kept_places] = kept[self.kept].to(found.dtype)
        return found


class ChunkGroup(NamedTuple):
    """Some rounds of chunks, each padded to `size` tokens."""

    chunks: slice  # among those of the step
    rounds: Sequence[int]  # chunks of each round, never more than those of the round before
    rows: Rows  # [chunks · size]: the token at each place; any at places that are padding
    tokens: Rows  # [n]: the tokens of the group
    places: Rows  # [n]: their places among the group's


class ChunkLayout(NamedTuple):
    size: int  # tokens of a padded chunk
    slots: Tensor  # [num_sequences] int64, in the order of a round
    groups: Sequence[ChunkGroup]
    edges: InputSources  # the inputs before each chunk [num_chunks · num_kept]
    tails: InputSources  # the last inputs of each sequence [num_sequences · num_kept]


class DraftRound(NamedTuple):
    """The i-th tokens of all sequences that have so many. All [n] int64."""

    tokens: Tensor  # among the layout's
    sources: Tensor | None  # rows of the states before these tokens; None: those of the targets
    targets: Tensor  # rows of the states behind them


class DraftLayout(NamedTuple):
    """Sequences with drafts. Their first token's states stay in their slot."""

    num_tokens: int
    slots: Tensor  # [num_sequences] int64
    targets: Tensor  # [num_tokens] int64: rows of the states behind each token
    rounds: Sequence[DraftRound]
    edges: InputSources  # the inputs before each token [num_tokens · num_kept]
    sequences: DeltaSequences | None  # as in `Prefill`


class Spans(NamedTuple):
    """Sequences and their chunks, as Triton's kernels take them. All int64.

    A chunk's rows are counted from a multiple of `CHUNK` of the whole sequence, so that rows of the first
    chunk may lie before the step's tokens.
    """

    slots: Tensor  # [num_sequences]
    starts: Tensor  # [num_sequences + 1], among these tokens
    shifts: Tensor  # [num_sequences]: tokens before the step, in the sequence's first chunk
    sequences: Tensor  # [num_chunks]
    numbers: Tensor  # [num_chunks]: which chunk of its sequence
    starts_on_host: Tensor  # `starts` in the host's memory


class Prefill(NamedTuple):
    """Sequences in chunks that are computed together. They lie side by side, and behind them some of their
    states are copied."""

    tokens: slice  # of the step
    chunks: ChunkLayout | None = None
    spans: Spans | None = None  # in place of `chunks`
    sequences: DeltaSequences | None = None  # for kernels, on the CPU; rows are counted from these tokens
    sources: Tensor | None = None  # [n] int64: slots of the states to be copied
    targets: Tensor | None = None  # [n] int64: where they are copied to


class DeltaPlan(NamedTuple):
    """DeltaTokens of decodes come first, then those of sequences with drafts, then those in chunks."""

    num_decodes: int
    decode_slots: Tensor  # [num_decodes] int64
    are_distinct: bool  # these slots, and on the CPU: no padding
    prefills: Sequence[Prefill] = ()  # one behind the other
    drafts: DraftLayout | None = None
    sequences: DeltaSequences | None = None  # of the decodes, as in `Prefill`


class _Piece(NamedTuple):
    """Tokens of a sequence."""

    sequence: int
    first: int
    num_tokens: int
    target: int  # where the state behind them is copied to; -1: nowhere


class _Chunk(NamedTuple):
    sequence: int
    start: int  # of its tokens of this step
    length: int


def plan_step(
    slots: Tensor,
    counts: Sequence[int] | None,
    starts: Sequence[int] | None,
    num_kept: int,
    drafts: Sequence[range] | None = None,
    saves: Sequence[Sequence[tuple[int, int]]] | None = None,
    has_spans: bool = False,
) -> DeltaPlan:
    """Of sequences with `counts` tokens behind `starts` ones; None: one each, and all stays on the device.

    num_kept: inputs before a token that its convolution sees. drafts: by sequence, the rows of the states
    behind its last tokens; a sequence that has any has one token more. saves: by sequence, tokens behind
    which its state is copied, and the row to which it is copied; fewer tokens than all, ascending.
    has_spans: prefills have spans in place of chunks.
    """
    if counts is None or starts is None:
        return DeltaPlan(len(slots), slots, False)
    num_decodes = sum(1 for _ in itertools.takewhile(lambda count: count == 1, counts))
    of_drafts = list(itertools.takewhile(len, (drafts or ())[num_decodes:]))
    first = num_decodes + len(of_drafts)
    drafted = None
    if of_drafts:
        of_sequences = slots[num_decodes:first], starts[num_decodes:first]
        drafted = _lay_out_drafts(*of_sequences, of_drafts, num_kept)
    assert not any((drafts or ())[first:]), "sequences with drafts follow those with one token"
    is_on_cpu = slots.device.type == "cpu"
    decodes = _sequences(slots[:num_decodes], counts[:num_decodes], starts) if is_on_cpu else None
    calls = _calls(counts, saves or [()] * len(counts), first)
    offsets = [0, *itertools.accumulate(counts)]
    prefills = [_prefill(slots, offsets, starts, pieces, num_kept, has_spans) for pieces in calls]
    return DeltaPlan(num_decodes, slots[:num_decodes], is_on_cpu, prefills, drafted, decodes)


def _calls(
    counts: Sequence[int], saves: Sequence[Sequence[tuple[int, int]]], first: int
) -> Iterator[list[_Piece]]:
    """Of the sequences from `first` on: pieces side by side, no sequence twice in a call."""
    call: list[_Piece] = []
    for number in range(first, len(counts)):
        start = 0
        for stop, target in [*saves[number], (counts[number], -1)]:
            if call and call[-1].sequence == number:
                yield call
                call = []
            call.append(_Piece(number, start, stop - start, target))
            start = stop
    if call:
        yield call


def _prefill(
    slots: Tensor,
    offsets: Sequence[int],
    starts: Sequence[int],
    pieces: Sequence[_Piece],
    num_kept: int,
    has_spans: bool,
) -> Prefill:
    """`offsets`: of the sequences' tokens in the step."""
    numbers, firsts, counts, targets = (list(column) for column in zip(*pieces, strict=True))
    of_pieces = slots[numbers[0] : numbers[-1] + 1]
    before = [starts[number] + first for number, first in zip(numbers, firsts, strict=True)]
    first = offsets[numbers[0]] + firsts[0]
    tokens = slice(first, first + sum(counts))
    if has_spans:
        found = Prefill(tokens, spans=_spans(of_pieces, counts, before))
    else:
        sequences = _sequences(of_pieces, counts, before) if slots.device.type == "cpu" else None
        found = Prefill(tokens, _lay_out(of_pieces, counts, before, num_kept), sequences=sequences)
    saved = np.flatnonzero(np.array(targets) >= 0)
    if not len(saved):
        return found
    rows = to_device(np.array(targets)[saved], slots.device)
    return found._replace(sources=of_pieces[to_device(saved, slots.device)], targets=rows)


def _spans(slots: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Spans:
    """Of sequences with `counts` tokens behind `starts` ones."""
    lengths, shifts = np.array(counts, np.int64), np.array(starts, np.int64) % CHUNK
    num_chunks = -(-(shifts + lengths) // CHUNK)
    sequences = np.repeat(np.arange(len(lengths)), num_chunks)
    numbers = np.arange(len(sequences)) - np.repeat(num_chunks.cumsum() - num_chunks, num_chunks)
    first_tokens = np.concatenate(([0], lengths.cumsum()))
    # In one piece: each copy to a device costs time.
    parts = (first_tokens, shifts, sequences, numbers)
    tables = to_device(np.concatenate(parts), slots.device).split([len(part) for part in parts])
    return Spans(slots, tables[0], tables[1], tables[2], tables[3], torch.from_numpy(first_tokens))


def _sequences(
    slots: Tensor, counts: Sequence[int], starts: Sequence[int], targets: Tensor | None = None
) -> DeltaSequences:
    """targets: of all tokens."""
    firsts = [*itertools.accumulate(counts[:-1], initial=0)]
    of_targets = [-1] * len(firsts) if targets is None else firsts
    columns = zip(slots.tolist(), firsts, counts, starts, of_targets, strict=False)
    return DeltaSequences(torch.tensor([*columns], dtype=torch.int64), targets)


def _lay_out_drafts(
    slots: Tensor, starts: Sequence[int], drafts: Sequence[range], num_kept: int
) -> DraftLayout:
    rows = [[slot, *of_sequence] for slot, of_sequence in zip(slots.tolist(), drafts, strict=True)]
    offsets, device = np.cumsum([0, *map(len, rows[:-1])]), slots.device
    rounds: list[DraftRound] = []
    for number in range(max(map(len, rows))):
        those = [index for index, of_sequence in enumerate(rows) if number < len(of_sequence)]
        before = [rows[index][number - 1] for index in those] if number else None
        behind = [rows[index][number] for index in those]
        sources = None if before is None else to_device(np.array(before), device)
        tokens, targets = to_device(offsets[those] + number, device), to_device(np.array(behind), device)
        rounds.append(DraftRound(tokens, sources, targets))
    positions = [
        (index, token) for index, of_sequence in enumerate(rows) for token in range(len(of_sequence))
    ]
    ranks = {index: index for index in range(len(rows))}
    edges = _inputs_before(positions, offsets, ranks, num_kept, device)
    targets = to_device(np.concatenate(rows), device)
    sequences = None
    if device.type == "cpu":
        sequences = _sequences(slots, [len(of_sequence) for of_sequence in rows], starts, targets)
    return DraftLayout(len(positions), slots, targets, rounds, edges, sequences)


def _lay_out(slots: Tensor, counts: Sequence[int], starts: Sequence[int], num_kept: int) -> ChunkLayout:
    pieces = [list(_pieces(start, count)) for start, count in zip(starts, counts, strict=True)]
    order = sorted(range(len(counts)), key=lambda number: -len(pieces[number]))
    rounds = [
        [_Chunk(number, *pieces[number][index]) for number in order if index < len(pieces[number])]
        for index in range(len(pieces[order[0]]))
    ]
    size = max(length for of_sequence in pieces for _, length in of_sequence)
    offsets = np.cumsum([0, *counts[:-1]])  # of each sequence's first token
    device, ranks = slots.device, {number: rank for rank, number in enumerate(order)}
    before = [(one.sequence, one.start) for chunks in rounds for one in chunks]
    ends = [(number, counts[number]) for number in order]
    return ChunkLayout(
        size,
        slots[to_device(np.array(order), device)],
        list(_groups(rounds, size, offsets, device)),
        _inputs_before(before, offsets, ranks, num_kept, device),
        _inputs_before(ends, offsets, ranks, num_kept, device),
    )


def _pieces(start: int, count: int) -> Iterator[tuple[int, int]]:
    """Parts of `count` tokens behind `start` ones: the first of each, and its length."""
    first = 0
    while first < count:
        length = min(CHUNK - (start + first) % CHUNK, count - first)
        yield first, length
        first += length


def _groups(
    rounds: Sequence[Sequence[_Chunk]], size: int, offsets: np.ndarray, device: torch.device
) -> Iterator[ChunkGroup]:
    first = num_chunks = 0
    while first < len(rounds):
        last, count = first + 1, len(rounds[first])
        while last < len(rounds) and count + len(rounds[last]) <= MAX_GROUP:
            count += len(rounds[last])
            last += 1
        rows = np.zeros((count, size), dtype=np.int64)
        is_token = np.zeros((count, size), dtype=np.bool_)
        for row, inside, one in zip(rows, is_token, itertools.chain(*rounds[first:last]), strict=True):
            row[: one.length] = offsets[one.sequence] + one.start + np.arange(one.length)
            inside[: one.length] = True
        yield ChunkGroup(
            slice(num_chunks, num_chunks + count),
            [len(chunks) for chunks in rounds[first:last]],
            _as_rows(rows.ravel(), device),
            _as_rows(rows[is_token], device),
            _as_rows(np.flatnonzero(is_token), device),
        )
        first, num_chunks = last, num_chunks + count


def _as_rows(numbers: np.ndarray, device: torch.device) -> Rows:
    first, count = int(numbers[0]), len(numbers)
    if np.array_equal(numbers, np.arange(first, first + count)):
        return slice(first, first + count)
    return to_device(numbers, device)


def _inputs_before(
    positions: Sequence[tuple[int, int]],
    offsets: np.ndarray,
    ranks: dict[int, int],
    num_kept: int,
    device: torch.device,
) -> InputSources:
    """The `num_kept` inputs before each position (sequence, token of this step)."""
    found: tuple[list[int], ...] = ([], [], [], [])
    for number, (sequence, position) in enumerate(positions):
        for index in range(num_kept):
            token, place = position - num_kept + index, number * num_kept + index
            if token >= 0:
                found[0].append(place)
                found[1].append(int(offsets[sequence]) + token)
            else:
                found[2].append(place)
                found[3].append(ranks[sequence] * num_kept + num_kept + token)
    return InputSources(*(to_device(np.array(part, dtype=np.int64), device) for part in found))
