"""Prompt lookup decoding (Saxena, 2023): the text goes on as it did where its last tokens stood before.

The last place of each n-gram is kept in a hash table, so that a proposal takes a few look-ups, however long
the text is: 4 bytes a place, as a long prompt would take 100 MB in a dict. Two n-grams may fall on one entry,
and then the older one is forgotten. Pure: no torch, no model.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

# The longest n-gram that is found decides, as it is the least likely to stand there by chance. With these
# four and `num_trusted`, a file written again with some changes takes a fifth of the steps, and any other
# text no more than without.
LENGTHS = (8, 5, 3, 2)
# Of a token, by its distance from the end of the n-gram: any odd ones. A sum's highest bits are the key.
FACTORS = (
    0xF2A74DE452E6B439, 0x6513270E269E0D37, 0x0C5C7FD0A6A3A451, 0xD23F0824128B2F33,
    0x1818E811892F902B, 0x9531985D5D9DC9F9, 0xE8E25D940ED90475, 0x36F675CC81E74EF5,
)  # fmt: skip
BITS, MASK = 64, (1 << 64) - 1  # of a sum
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
        self._num_indexed = 0
        self._make_tables(MIN_PLACES)

    def extend(self, token_ids: Sequence[int]) -> None:
        self._text += token_ids
        num_places = len(self._tables[0])
        while num_places < 2 * len(self._text):
            num_places *= 2
        if num_places > len(self._tables[0]):
            self._make_tables(num_places)
        # What ends with the last token is not indexed: nothing has followed it.
        start, self._num_indexed = self._num_indexed, len(self._text)
        if self._num_indexed - start > FEW:
            self._index(start, self._num_indexed)
            return
        for table, length in zip(self._tables, self._lengths, strict=True):
            for place in range(max(start, length), self._num_indexed):
                table[self._key(length, place)] = place

    def propose(self, num_tokens: int) -> list[int]:
        """Where the text ends, the guess goes on with itself: a text may repeat a short part."""
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
        self._shift = BITS - (num_places.bit_length() - 1)
        self._num_indexed = 0

    def _key(self, length: int, place: int) -> int:
        """Of the n-gram that ends before `place`."""
        last = zip(reversed(self._text[place - length : place]), FACTORS, strict=False)
        return (sum(token_id * factor for token_id, factor in last) & MASK) >> self._shift

    def _index(self, start: int, stop: int) -> None:
        """The n-grams that end before each of these places, in order: the last one of its kind stays."""
        for table, length in zip(self._tables, self._lengths, strict=True):
            places = np.arange(max(start, length), stop)
            if not len(places):
                continue
            text = np.array(self._text[places[0] - length : stop], dtype=np.uint64)
            keys = np.zeros(len(places), dtype=np.uint64)
            for distance in range(length):
                first = length - 1 - distance
                keys += text[first : first + len(places)] * np.uint64(FACTORS[distance])
            np.frombuffer(table, dtype=np.int32)[keys >> np.uint64(self._shift)] = places
