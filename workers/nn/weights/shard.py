"""The part of a weight's axis that a rank holds. The model chooses it, the format cuts it out."""

from __future__ import annotations

from typing import NamedTuple


class Shard(NamedTuple):
    """Ranges of an axis, concatenated, with zeros behind them.

    Several ranges, since one tensor of a checkpoint may concatenate several layers (queries and their gates;
    the gate and up projections of an MLP), and a rank holds a part of each.
    """

    slices: tuple[slice, ...] = (slice(None),)
    padding: int = 0  # zeros that are not in the checkpoint
    size: int = 0  # of the whole axis, by the model's settings; 0: the file's own counts

    @classmethod
    def of_range(cls, start: int, stop: int, padding: int = 0) -> Shard:
        return cls((slice(start, stop),), padding)

    @classmethod
    def split(cls, size: int, rank: int, num_ranks: int) -> Shard:
        """One of `num_ranks` equal parts of an axis. `size` must be a multiple of `num_ranks`."""
        assert size % num_ranks == 0, "the model refuses what does not divide, with a word of its own"
        return cls((slice(rank * size // num_ranks, (rank + 1) * size // num_ranks),), size=size)

    def check(self, size: int, what: str) -> None:
        """Raises ValueError where an axis of a file is not as the model's settings have it."""
        last = max((part.stop or 0 for part in self.slices), default=0)
        if (self.size and size != self.size) or last > size:
            raise ValueError(
                f"{what} are {size} in the checkpoint's file, by its config.json {self.size or last}"
            )

    @classmethod
    def split_padded(cls, size: int, rank: int, num_ranks: int) -> Shard:
        """One of `num_ranks` parts of one size; the last parts are padded with zeros."""
        part = -(-size // num_ranks)
        start, stop = min(rank * part, size), min((rank + 1) * part, size)
        return cls.of_range(start, stop, part - (stop - start))


WHOLE = Shard()


class ExpertsShard(NamedTuple):
    """A layer's experts, and which of them a rank holds: all or some, whole or of each a part."""

    num_experts: int
    hidden_size: int
    intermediate_size: int  # of each expert
    held: range  # by this rank
    intermediate: Shard  # the part of the intermediate size

    def check_hidden(self, size: int, name: str) -> None:
        """Raises ValueError where a matrix of an expert has another hidden size than the model."""
        if size != self.hidden_size:
            raise ValueError(
                f"the hidden size of {name!r} is {size} in the checkpoint's file, by its config.json "
                f"{self.hidden_size}"
            )

    @property
    def gate_up(self) -> Shard:
        """Of the gate and up projections side by side, gate first."""
        parts = self.intermediate.slices
        size = self.intermediate_size
        both = (*parts, *(slice(part.start + size, part.stop + size) for part in parts))
        return Shard(both, size=2 * size)
