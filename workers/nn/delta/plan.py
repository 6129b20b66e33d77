"""How the tokens of a step are laid out for layers with a delta rule: once a step, for all such layers.

Leading sequences with one token are computed step by step. All others are cut into chunks of at most `CHUNK`
tokens, at multiples of `CHUNK` from the start of the sequence, so that the same tokens are cut alike however
the steps were. The i-th chunks of all sequences are computed together (a round), those of the longest
sequences first: the chunks of a round, and its sequences, lie side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.nn.loader import to_device

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


class Spans(NamedTuple):
    """Sequences behind the decodes, as kernels take them, and their chunks. All int64.

    A chunk's rows are counted from a multiple of `CHUNK` of the whole sequence, so that rows of the first
    chunk may lie before the step's tokens.
    """

    slots: Tensor  # [num_sequences]
    starts: Tensor  # [num_sequences + 1], among the tokens behind the decodes
    shifts: Tensor  # [num_sequences]: tokens before the step, in the sequence's first chunk
    sequences: Tensor  # [num_chunks]
    numbers: Tensor  # [num_chunks]: which chunk of its sequence
    starts_on_host: Tensor  # `starts` in the host's memory


class DeltaPlan(NamedTuple):
    """DeltaTokens of decodes come first, then those in chunks."""

    num_decodes: int
    decode_slots: Tensor  # [num_decodes] int64
    are_distinct: bool  # these slots, and on the CPU: no padding
    chunks: ChunkLayout | None
    spans: Spans | None = None  # in place of `chunks`, for kernels


class _Chunk(NamedTuple):
    sequence: int
    start: int  # of its tokens of this step
    length: int


def plan_step(
    slots: Tensor, counts: Sequence[int] | None, starts: Sequence[int] | None, num_kept: int
) -> DeltaPlan:
    """Of sequences with `counts` tokens behind `starts` ones; None: one each, and all stays on the device.

    num_kept: inputs before a token that its convolution sees.
    """
    if counts is None or starts is None:
        return DeltaPlan(len(slots), slots, False, None)
    num_decodes = _num_decodes(counts)
    rest = counts[num_decodes:]
    layout = _lay_out(slots[num_decodes:], rest, starts[num_decodes:], num_kept) if rest else None
    return DeltaPlan(num_decodes, slots[:num_decodes], slots.device.type == "cpu", layout)


def plan_spans(
    slots: Tensor, counts: Sequence[int] | None, starts: Sequence[int] | None, num_kept: int
) -> DeltaPlan:
    """`plan_step` for kernels."""
    if counts is None or starts is None:
        return DeltaPlan(len(slots), slots, False, None)
    num_decodes = _num_decodes(counts)
    rest, before = np.array(counts[num_decodes:], np.int64), np.array(starts[num_decodes:], np.int64)
    if not len(rest):
        return DeltaPlan(num_decodes, slots, False, None)
    shifts = before % CHUNK
    num_chunks = -(-(shifts + rest) // CHUNK)
    sequences = np.repeat(np.arange(len(rest)), num_chunks)
    numbers = np.arange(len(sequences)) - np.repeat(num_chunks.cumsum() - num_chunks, num_chunks)
    first_tokens = np.concatenate(([0], rest.cumsum()))
    # In one piece: each copy to a device costs time.
    parts = (first_tokens, shifts, sequences, numbers)
    on_device = to_device(np.concatenate(parts), slots.device)
    tables = on_device.split([len(part) for part in parts])
    spans = Spans(
        slots[num_decodes:], tables[0], tables[1], tables[2], tables[3], torch.from_numpy(first_tokens)
    )
    return DeltaPlan(num_decodes, slots[:num_decodes], False, None, spans)


def _num_decodes(counts: Sequence[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda count: count == 1, counts))


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
