"""Slots: each running sequence has one, in the runner's tables and in the states that layers keep. Pure.

A state cannot be cut: it is that behind the last token, and nothing else. So a prefix can only be gone on
from where a copy of the state was kept.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol


class Snapshots(Protocol):
    """Copies of states at ends of blocks. Which are kept is a policy of its own; so far nobody keeps any."""

    def longest_boundary(self, hashes: Sequence[bytes]) -> int:
        """The most of these blocks, from the first on, behind which a state is kept; 0: none is."""
        ...


class StateSlots:
    """`num_slots` slots. `has_states`: the model has layers that keep a state."""

    def __init__(self, num_slots: int, has_states: bool, snapshots: Snapshots | None = None) -> None:
        self.num_slots = num_slots
        self._has_states, self._snapshots = has_states, snapshots
        self._free = list(range(num_slots - 1, -1, -1))
        self._taken: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def can_resume(self) -> bool:
        """Whether a sequence may ever go on behind a prefix that another has computed."""
        return not self._has_states or self._snapshots is not None

    def longest_boundary(self, hashes: Sequence[bytes]) -> int:
        """The most of these blocks, from the first on, behind which all states can be had."""
        if not self._has_states:
            return len(hashes)
        return 0 if self._snapshots is None else self._snapshots.longest_boundary(hashes)

    def allocate(self, owner: Hashable) -> int:
        """Raises ValueError if the request has a slot already or none is free."""
        if owner in self._taken or not self._free:
            raise ValueError(f"no slot for {owner}: {len(self._free)} are free, or it has one already")
        slot = self._taken[owner] = self._free.pop()
        return slot

    def free(self, owner: Hashable) -> None:
        self._free.append(self._taken.pop(owner))

    def check_integrity(self) -> None:
        slots = sorted([*self._taken.values(), *self._free])
        assert slots == list(range(self.num_slots)), "a slot is lost or used twice"
