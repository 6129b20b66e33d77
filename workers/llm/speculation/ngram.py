"""Prompt lookup decoding (Saxena, 2023): the text goes on as it did where its last tokens stood before.

The last place of each n-gram is kept in a hash table, so that a proposal takes a few look-ups, however long
the text is: 4 bytes a place, as a long prompt would take 100 MB in a dict. Two n-grams may fall on one entry,
and then the older one is forgotten. Pure: no torch, no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

# The longest n-gram that is found decides, as it is the least likely to stand there by chance. With these four
# and `num_trusted`, a file written again with some changes takes a fifth of the steps, and any other text no
# more than without.
LENGTHS = (8, 5, 3, 2)
# Of a token, by its distance from the end of the n-gram. Odd, so that no bit of a token is lost.
FACTORS = (
    0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1, 0xD3A2646D, 0xFD7046C5, 0xB55A4F09,
)  # fmt: skip
MIN_PLACES = 1024  # of a table
FEW = 16  # tokens, for which numpy's calls would take longer than a loop


def num_trusted(length: int) -> int:
    """How many tokens behind an n-gram of this length are worth a guess."""
    return 2 * (length - 1)


class NgramProposer:
    def __init__(self, lengths: Sequence[int] = LENGTHS) -> None:
        """`lengths` of n-grams, in the order in which they are tried."""
        assert max(lengths) <= len(FACTORS)
        self._lengths = lengths
        self._text: list[int] = []
        self._make_tables(MIN_PLACES)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._text += token_ids
        if len(self._text) > len(self._tables[0]) // 2:
            self._make_tables(1 << (2 * len(self._text)).bit_length())
        # What ends with the last token is not indexed: nothing has followed it.
        start, self._num_indexed = self._num_indexed, len(self._text)
        if self._num_indexed - start > FEW:
            self._index(start, self._num_indexed)
            return
        for table, length in zip(self._tables, self._lengths, strict=True):
            for place in range(max(start, length), self._num_indexed):
                table[self._key(length, place)] = place

    def propose(self, num_tokens: int) -> list[int]:
        """Goes on behind the end of the text with the guess itself, as in a text that repeats a short part."""
        text = self._text
        for table, length in zip(self._tables, self._lengths, strict=True):
            if len(text) <= length:
                continue
            place = table[self._key(length, len(text))]
            if place and text[place - length : place] == text[-length:]:
                wanted = min(num_tokens, num_trusted(length))
                drafts = text[place : place + wanted]
                while len(drafts) < wanted:
                    drafts += drafts[: wanted - len(drafts)]
                return drafts
        return []

    def _make_tables(self, num_places: int) -> None:
        """Empty ones; a power of two of places. The whole text is to be indexed."""
        # By the n-gram's key: the place behind its last occurrence; 0: none.
        self._tables = [array("i", bytes(4 * num_places)) for _ in self._lengths]
        self._num_indexed = 0

    def _key(self, length: int, place: int) -> int:
        """Of the n-gram that ends before `place`."""
        last = zip(reversed(self._text[place - length : place]), FACTORS, strict=False)
        return sum(token_id * factor for token_id, factor in last) & len(self._tables[0]) - 1

    def _index(self, start: int, stop: int) -> None:
        """The n-grams that end before each of these places, in order: the last one of its kind stays."""
        for table, length in zip(self._tables, self._lengths, strict=True):
            places = np.arange(max(start, length), stop)
            if not len(places):
                continue
            text = np.array(self._text[places[0] - length : stop], dtype=np.int64)
            keys = np.zeros(len(places), dtype=np.int64)  # overflows do not change the lowest bits
            for distance in range(length):
                first = length - 1 - distance
                keys += text[first : first + len(places)] * FACTORS[distance]
            np.frombuffer(table, dtype=np.int32)[keys & len(table) - 1] = places
