"""Tokens chosen one after another, as long as the drafts are right."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.wire.packing import Int32Array
from workers.llm.sequences import StepRows
from workers.llm.unchosen import Unchosen, logit_rows

# Of six sequences: a decode, two with drafts, a prefill's middle, a prefill's end, a decode with one draft.
COUNTS = np.array([1, 3, 4, 5, 5, 2])
DRAFTS = {1: [11, 12], 2: [21, 22, 23], 5: [51]}
SAMPLED = np.array([True, True, True, False, True, True])


def drafts_of(numbers: dict[int, list[int]]) -> dict[int, Int32Array]:
    return {row: np.array(drafts, dtype=np.int32) for row, drafts in numbers.items()}


def rows() -> StepRows:
    starts, slots = np.array([10, 20, 30, 0, 5, 50]), np.array([3, 1, 4, 0, 5, 2])
    return StepRows(slots, starts, COUNTS, SAMPLED, COUNTS == 1, drafts_of(DRAFTS))


def unchosen() -> Unchosen:
    """Each row of the logits is the index of its token in the step."""
    where = logit_rows(rows(), np.cumsum(COUNTS))
    assert where.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 17, 18, 19]
    return Unchosen.of(rows(), torch.from_numpy(where).float()[:, None])


def indexes(some: Unchosen) -> list[int]:
    return [int(value) for value in some.next_logits[:, 0].tolist()]


def test_the_first_tokens_are_chosen_behind_what_is_certain() -> None:
    first = unchosen()
    assert first.places.tolist() == [0, 1, 2, 3, 4]
    assert first.slots.tolist() == [3, 1, 4, 5, 2]
    assert first.num_tokens.tolist() == [11, 21, 31, 10, 51]
    assert indexes(first) == [0, 1, 4, 17, 18]


def test_a_right_draft_brings_the_next_token() -> None:
    second = unchosen().behind(np.array([7, 11, 21, 11, 99]))
    assert second.places.tolist() == [1, 2]
    assert second.slots.tolist() == [1, 4]
    assert second.num_tokens.tolist() == [22, 32]
    assert indexes(second) == [2, 5]
    third = second.behind(np.array([13, 22]))
    assert (third.places.tolist(), third.num_tokens.tolist(), indexes(third)) == ([2], [33], [6])
    last = third.behind(np.array([23]))
    assert (last.places.tolist(), indexes(last)) == ([2], [7]), "the token behind all drafts"
    assert last
    assert not last.behind(np.array([23]))


def test_some_sequences_have_rows_of_their_own() -> None:
    some = unchosen().at(np.array([2, 4]))
    assert (some.places.tolist(), some.num_tokens.tolist()) == ([2, 4], [31, 51])
    assert some.logits[:, 0].tolist() == [4, 5, 6, 7, 18, 19]
    assert some.rows.tolist() == [0, 4]
    assert indexes(some.behind(np.array([21, 51]))) == [5, 19]


def test_without_drafts_there_is_one_row_each() -> None:
    plain = rows()._replace(drafts={})
    assert logit_rows(plain, np.cumsum(COUNTS)).tolist() == [0, 3, 7, 17, 19]
    whole = Unchosen.of(plain, torch.arange(5.0)[:, None])
    assert whole.next_logits is whole.logits
    assert not whole.behind(np.arange(5))
    assert whole.at(np.array([1, 3])).logits[:, 0].tolist() == [1, 3]
