"""Whose turn it is, when many want something that is done one at a time: fair queueing by start times. Pure.

Start-time fair queueing (Goyal, Vin and Cheng 1996): each piece of work is stamped with the virtual time at
which its owner's turn comes, the lowest goes first. An owner with much to do gets every n-th turn among n
owners, and none for what it did not use before.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Hashable, Sequence
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
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


class Turns(Generic[K]):
    """The same where a turn is given out when work is taken, not when it comes: for owners whose work has an
    order of its own.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[K, float] = {}

    def start(self, owner: K) -> float:
        """When the owner's next turn comes, in virtual time. The lowest goes first."""
        return max(self._now, self._ends.get(owner, 0.0))

    def charge(self, owner: K, cost: float) -> None:
        """The owner has had its turn. To be called for the one that went first."""
        if len(self._ends) > PRUNE_ABOVE:
            self._prune()
        start = self.start(owner)
        self._now, self._ends[owner] = start, start + cost

    def _prune(self) -> None:
        """Owners that come once and never again let time stand still: half of those that are ahead lose their
        lead.
        """
        self._now = max(self._now, sorted(self._ends.values())[len(self._ends) // 2])
        self._ends = {key: end for key, end in self._ends.items() if end > self._now}

    def arrange(self, work: Sequence[tuple[K, float]]) -> list[int]:
        """The places in `work`, of owners and costs, in turn. Each owner's own pieces keep their order."""
        places: dict[K, deque[int]] = {}
        for place, (owner, _) in enumerate(work):
            places.setdefault(owner, deque()).append(place)
        heads = [(self.start(owner), queue[0]) for owner, queue in places.items()]
        heapq.heapify(heads)
        order: list[int] = []
        while heads:
            start, place = heapq.heappop(heads)
            owner, cost = work[place]
            order.append(place)
            places[owner].popleft()
            if places[owner]:
                heapq.heappush(heads, (start + cost, places[owner][0]))
        return order


class _Line(Generic[K, T]):
    """What waits of one tenant: a heap by virtual time, then order."""

    def __init__(self) -> None:
        self.clock: FairClock[K] = FairClock()
        self.heap: list[tuple[float, Any, int, float, T]] = []  # the number keeps items from being compared


class FairQueue(Generic[K, T]):
    """What waits to be done one at a time: tenants take turns, and within a tenant the owners of work (its
    requests).
    """

    def __init__(self) -> None:
        self._turns: Turns[str] = Turns()
        self._lines: dict[str, _Line[K, T]] = {}
        self._num_pushed = 0

    def push(self, tenant: str, owner: K, cost: float, order: Any, item: T) -> None:
        """`order` decides between pieces whose turns come at the same time."""
        if len(self._lines) > PRUNE_ABOVE:
            self._lines = {name: line for name, line in self._lines.items() if line.heap}
        line = self._lines.setdefault(tenant, _Line())
        self._num_pushed += 1
        heapq.heappush(line.heap, (line.clock.stamp(owner, cost), order, self._num_pushed, cost, item))

    def _next(self, held_up: Container[str] = ()) -> str | None:
        lines = [(name, line.heap) for name, line in self._lines.items() if line.heap and name not in held_up]
        return min((self._turns.start(name), heap[0][1], name) for name, heap in lines)[-1] if lines else None

    def peek(self, held_up: Container[str] = ()) -> T | None:
        """What is next, but for the tenants that are held up."""
        tenant = self._next(held_up)
        return None if tenant is None else self._lines[tenant].heap[0][-1]

    def pop(self, held_up: Container[str] = ()) -> T:
        """Takes what `peek` shows: its tenant and its owner have had their turn."""
        tenant = self._next(held_up)
        assert tenant is not None, "nothing waits"
        line = self._lines[tenant]
        start, _, _, cost, item = heapq.heappop(line.heap)
        line.clock.advance(start)
        self._turns.charge(tenant, cost)
        return item

    def drop(self, held_up: Container[str] = ()) -> None:
        """Takes away what `peek` shows, for which nobody waits any more."""
        tenant = self._next(held_up)
        assert tenant is not None, "nothing waits"
        heapq.heappop(self._lines[tenant].heap)
