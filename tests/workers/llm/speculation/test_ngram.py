"""Where the last tokens of a text stood before, and how it went on there."""

from __future__ import annotations

import random

import pytest

from workers.llm.speculation.ngram import FEW, LENGTHS, MIN_PLACES, NgramProposer, num_trusted


def proposer(*parts: list[int]) -> NgramProposer:
    made = NgramProposer()
    for part in parts:
        made.extend(part)
    return made


def test_a_text_goes_on_as_before() -> None:
    made = proposer([*range(100, 120), 7], [*range(100, 108)])
    assert made.propose(5) == [108, 109, 110, 111, 112]
    assert made.propose(99) == [*range(108, 120), 7, 100]
    assert len(made.propose(99)) == num_trusted(8) == 14


def test_what_was_never_seen_gives_no_guess() -> None:
    assert proposer().propose(5) == []
    assert proposer([1]).propose(5) == []
    assert proposer([1, 2, 3, 4]).propose(5) == []
    assert proposer([1, 2, 3], [9, 3]).propose(5) == [], "one token alone stands anywhere by chance"


def test_a_short_coincidence_is_trusted_less_than_a_long_one() -> None:
    text = [*range(1, 30), 50]
    for length, wanted in zip(LENGTHS, (14, 8, 4, 2), strict=True):
        made = proposer(text, [60, *range(11 - length, 11)])
        assert made.propose(99) == [*range(11, 11 + wanted)], length


def test_the_longest_match_decides_and_then_the_last() -> None:
    first, last = [1, 2, 3, 4, 5, 21, 31], [9, 9, 4, 5, 22, 32]
    assert proposer(first, last, [1, 2, 3, 4, 5]).propose(2) == [21, 31]
    assert proposer(first, last, [8, 4, 5]).propose(2) == [22, 32]


def test_a_repeated_part_goes_on_beyond_the_end() -> None:
    assert proposer([1, 2, 3] * 4).propose(7) == [1, 2, 3, 1, 2, 3, 1]
    assert proposer([4] * 9).propose(3) == [4, 4, 4]


@pytest.mark.parametrize("seed", range(3))
def test_the_index_of_pieces_is_that_of_the_whole(seed: int) -> None:
    """Loops and numpy give one n-gram one key; also where the tables have grown."""
    rng = random.Random(seed)
    whole = [rng.choice((1, 2, 150_000, rng.randrange(1 << 31))) for _ in range(MIN_PLACES)]
    single, pieces = proposer(*([token] for token in whole)), NgramProposer()
    start = 0
    while start < len(whole):
        stop = start + rng.choice((1, 2, FEW, FEW + 1, 100))
        pieces.extend(whole[start:stop])
        start = stop
        assert pieces.propose(9) == proposer(whole[:start]).propose(9)
    assert single._tables == pieces._tables == proposer(whole)._tables
    assert len(single._tables[0]) > MIN_PLACES


def test_two_n_grams_with_one_key_are_told_apart() -> None:
    rng = random.Random(1)
    made = proposer([rng.randrange(1 << 31) for _ in range(20_000)])
    for table in made._tables:
        table[made._key(2, 500)] = 7  # another one's place
    made.extend([made._text[498], made._text[499]])
    assert made.propose(3) == []
