"""What the soak calls wrong."""

from __future__ import annotations

import random

import numpy as np

from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.packing import pack_int32
from tools.soak import Answer, difference, make_chats


def logprobs(*values: float) -> TokenLogprobs:
    return TokenLogprobs(pack_int32(range(len(values))), np.array(values, "<f4").tobytes())


def answer(tokens: list[int], second: float = -2.0) -> Answer:
    entries = [logprobs(-0.1, -0.1, second) for _ in tokens]
    return Answer("text", tokens, entries, "stop", 5, len(tokens))


def test_only_a_tie_at_the_first_difference_is_excused() -> None:
    reference = answer([1, 2, 3])
    assert difference(answer([1, 2, 3]), reference) == ""
    assert difference(answer([1, 9, 3]), reference) == "token 1 of 3 differs (3 came)"
    assert difference(answer([1, 2]), reference) == "token 2 of 3 differs (2 came)"
    reference.logprobs[1] = logprobs(-0.1, -0.1, -0.1005)
    assert difference(answer([1, 9, 3]), reference) == "tie"
    assert difference(answer([9, 2, 3]), reference).startswith("token 0"), "the tie is elsewhere"
    assert difference(answer([1, 2, 3, 4]), reference).startswith("token 3"), (
        "behind the reference's end there is none"
    )


def test_texts_reasons_and_counts_are_compared_too() -> None:
    reference = answer([1, 2])
    for name, value in (
        ("text", "other"),
        ("finish_reason", "abort"),
        ("num_prompt_tokens", 6),
        ("num_output_tokens", 3),
    ):
        wrong = answer([1, 2])
        setattr(wrong, name, value)
        assert name in difference(wrong, reference)
    short = answer([1, 2])
    short.logprobs.pop()
    assert "logprobs" in difference(short, reference)


def test_a_seed_names_the_chats() -> None:
    first, second, other = (make_chats(12, random.Random(seed), 40) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert {chat.sampling.temperature for chat in first} == {0.0, 0.8}
    assert {len(turn.pictures) for chat in first for turn in chat.turns} == {0, 1, 2}
