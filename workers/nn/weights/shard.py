"""Which part of a weight's axis a rank holds.

The model says so; how the part is cut out is the format's affair.
"""

from __future__ import annotations

from typing import NamedTuple


class Shard(NamedTuple):
    """Ranges of an axis, side by side, and zeros behind them.

    Several ranges, since a checkpoint may have several things in one tensor (queries and their gates; the
    gate and the up projection of an MLP), of each of which a rank holds a part.
    """

    slices: tuple[slice, ...] = (slice(None),)
    padding: int = 0  # entries that the rank has and the checkpoint has not

    @classmethod
    def of_range(cls, start: int, stop: int, padding: int = 0) -> Shard:
        return cls((slice(start, stop),), padding)

    @classmethod
    def split(cls, size: int, rank: int, num_ranks: int) -> Shard:
        """One of `num_ranks` equal parts of an axis. `size` must be a multiple of their number."""
        assert size % num_ranks == 0, "the model refuses what does not divide, with a word of its own"
        return cls.of_range(rank * size // num_ranks, (rank + 1) * size // num_ranks)

    @classmethod
    def split_padded(cls, size: int, rank: int, num_ranks: int) -> Shard:
        """One of `num_ranks` parts of the same size, of which the last are filled up with zeros."""
        part = -(-size // num_ranks)
        start, stop = min(rank * part, size), min((rank + 1) * part, size)
        return cls.of_range(start, stop, part - (stop - start))


WHOLE = Shard()
