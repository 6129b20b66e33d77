"""Start-time fair queueing of work that is done one piece at a time (Goyal, Vin and Cheng 1996). Pure.

Each piece is stamped with the virtual time at which its owner's turn comes; the lowest stamp goes first.
Among n owners with work each gets every n-th turn, and an owner saves no turns while it has no work.
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
        """The virtual start time of one more piece of an owner's work."""
        if len(self._ends) > PRUNE_ABOVE:
            self._ends = {key: end for key, end in self._ends.items() if end > self._now}
        start = max(self._now, self._ends.get(owner, 0.0))
        self._ends[owner] = start + cost
        return start

    def advance(self, start: float) -> None:
        """The piece with this stamp, the lowest of all waiting pieces, is begun."""
        self._now = max(self._now, start)


class Turns(Generic[K]):
    """Stamps work when it is taken, not when it arrives: for owners whose work has an order of its own."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[K, float] = {}

    def start(self, owner: K) -> float:
        """The virtual time of the owner's next turn. The lowest goes first."""
        return max(self._now, self._ends.get(owner, 0.0))

    def charge(self, owner: K, cost: float) -> None:
        """The owner, whose `start` was the lowest, has had its turn."""
        if len(self._ends) > PRUNE_ABOVE:
            self._prune()
        start = self.start(owner)
        self._now, self._ends[owner] = start, start + cost

    def _prune(self) -> None:
        """Owners that come only once never advance virtual time, so none of them would expire: half of the
        owners that are ahead lose their lead."""
        self._now = max(self._now, sorted(self._ends.values())[len(self._ends) // 2])
        self._ends = {key: end for key, end in self._ends.items() if end > self._now}

    def arrange(self, work: Sequence[tuple[K, float]]) -> list[int]:
        """The indices of `work` (owners and costs) in fair order. An owner's own pieces keep their order."""
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
    """The waiting work of one tenant: a heap by virtual time, then order."""

    def __init__(self) -> None:
        self.clock: FairClock[K] = FairClock()
        self.heap: list[tuple[float, Any, int, float, T]] = []  # the number keeps items from being compared


class FairQueue(Generic[K, T]):
    """A queue in which tenants take turns, and within a tenant the owners of work (its requests)."""

    def __init__(self) -> None:
        self._turns: Turns[str] = Turns()
        self._lines: dict[str, _Line[K, T]] = {}
        self._num_pushed = 0

    def push(self, tenant: str, owner: K, cost: float, order: Any, item: T) -> None:
        """`order` breaks ties of virtual time."""
        if len(self._lines) > PRUNE_ABOVE:
            self._lines = {name: line for name, line in self._lines.items() if line.heap}
        line = self._lines.setdefault(tenant, _Line())
        self._num_pushed += 1
        heapq.heappush(line.heap, (line.clock.stamp(owner, cost), order, self._num_pushed, cost, item))

    def _next(self, held_up: Container[str] = ()) -> str | None:
        lines = [(name, line.heap) for name, line in self._lines.items() if line.heap and name not in held_up]
        return min((self._turns.start(name), heap[0][1], name) for name, heap in lines)[-1] if lines else None

    def peek(self, held_up: Container[str] = ()) -> T | None:
        """The next item, without those of the tenants in `held_up`."""
        tenant = self._next(held_up)
        return None if tenant is None else self._lines[tenant].heap[0][-1]

    def pop(self, held_up: Container[str] = ()) -> T:
        """Takes the item that `peek` returns, and charges its tenant and its owner."""
        tenant = self._next(held_up)
        assert tenant is not None, "nothing waits"
        line = self._lines[tenant]
        start, _, _, cost, item = heapq.heappop(line.heap)
        line.clock.advance(start)
        self._turns.charge(tenant, cost)
        return item

    def drop(self, held_up: Container[str] = ()) -> None:
        """Removes the item that `peek` returns without a charge: it is not wanted any more."""
        tenant = self._next(held_up)
        assert tenant is not None, "nothing waits"
        heapq.heappop(self._lines[tenant].heap)
