"""Slots: each running sequence has one, in the runner's tables and in the layers' state tensors. Pure.

A state belongs to one position, behind the last token of its sequence, and cannot be rolled back to an
earlier one. So a cached prefix can be reused only up to a position with a snapshot of the state.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from workers.llm.cache.snapshots import Snapshots


class StateSlots:
    """`num_slots` slots. `has_states`: the model has layers that keep a state."""

    def __init__(self, num_slots: int, has_states: bool, snapshots: Snapshots | None = None) -> None:
        self.num_slots = num_slots
        self._has_states, self.snapshots = has_states, snapshots
        self._free = list(range(num_slots - 1, -1, -1))
        self._taken: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def can_resume(self) -> bool:
        """Whether a sequence can reuse a cached prefix at all."""
        return not self._has_states or self.snapshots is not None

    def longest_boundary(self, hashes: Sequence[bytes]) -> int:
        """The number of leading blocks up to the last boundary at which all layers can resume."""
        if not self._has_states:
            return len(hashes)
        return 0 if self.snapshots is None else self.snapshots.longest_boundary(hashes)

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
