"""What pieces add up to."""

from __future__ import annotations

import math

import numpy as np

from pipeline.client.client import Piece
from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import FinishReason
from workers.api.answer import Answer, Usage
from workers.api.parsers.base import Content
from workers.api.parsers.plain import PlainParser


def made(num_choices: int = 1) -> Answer:
    return Answer(num_choices, PlainParser, lambda token_id: bytes([token_id]))


def scores(ids: list[int], values: list[float]) -> TokenLogprobs:
    return TokenLogprobs(pack_int32(ids), np.array(values, "<f4").tobytes())


def test_the_prompt_counts_once_and_each_choice_its_own_output() -> None:
    answer = made(2)
    answer.add(Piece("a", (1,), None, 10, 1, 4, index=0))
    answer.add(Piece("b", (1,), None, 10, 1, 4, index=1))
    answer.add(Piece("c", (1,), FinishReason.STOP, 10, 3, 4))
    assert answer.usage == Usage(10, 4, 4)
    assert [choice.finish_reason for choice in answer.choices] == [FinishReason.STOP, None]


def test_an_update_has_what_its_piece_adds_and_only_kept_ones_stay() -> None:
    answer = made()
    piece = Piece(
        "hi", (104, 105), None, 1, 2, 0, (scores([104, 72], [-0.5, -1.0]), scores([105], [-math.inf]))
    )
    update = answer.add(piece)
    assert (update.choice, update.events, update.finish_reason) == (0, (Content("hi"),), None)
    first, second = update.logprobs
    assert (first.chosen, first.best) == ((b"h", -0.5, 104), ((b"H", -1.0, 72),))
    assert (second.chosen, second.best) == ((b"i", -math.inf, 105), ())
    (choice,) = answer.choices
    assert (choice.content, choice.logprobs) == ([], [])
    answer.keep(update)
    answer.keep(answer.add(Piece("!", (33,), FinishReason.LENGTH, 1, 3)))
    assert ("".join(choice.content), choice.logprobs) == ("hi!", [first, second])
