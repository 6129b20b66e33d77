"""Whose turn it is, when many want something that is done one at a time: fair queueing by start times. Pure.

Start-time fair queueing (Goyal, Vin and Cheng 1996): each piece of work is stamped with the virtual time at which its owner's turn comes,
the lowest goes first. An owner with much to do gets every n-th turn among n owners, and none for what it did not use before.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
PRUNE_ABOVE = 1024


class FairClock(Generic[K]):
    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[K, float] = {}

    def stamp(self, owner: K, cost: float) -> float:
        """The start of one more piece of work of an owner, in virtual time."""
        if len(self._ends) > PRUNE_ABOVE:
            self._ends = {key: end for key, end in self._ends.items() if end > self._now}
        start = max(self._now, self._ends.get(owner, 0.0))
        self._ends[owner] = start + cost
        return start

    def advance(self, start: float) -> None:
        """The piece with this stamp, the lowest of all that wait, is begun."""
        self._now = max(self._now, start)
