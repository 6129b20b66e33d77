"""Who gets which part of a tensor pool, and in which order. Pure bookkeeping: no memory, no torch, no sockets.

`SlotAllocator` cuts slots out of a block of bytes; `OrderedSlots` grants them in the order (request arrival, item position).
The last part of each pool is kept for the oldest item that has no slot yet. Without it requests that have half of their
items in a pool could wait for each other in a circle; with it the oldest request always gets its next item, so it ends.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

ALIGNMENT = 256  # bytes; enough for any dtype and for vector loads
K = TypeVar("K", bound=Hashable)


class Slot(NamedTuple):
    number: int  # row of the pool's generation table
    generation: int
    offset: int  # bytes
    nbytes: int


class Order(NamedTuple):
    """Position in the one global order: requests as the LLM admits them, then the items of a request as they stand."""

    arrival: int
    position: int


class _Region:
    """First-fit allocation over [start, stop), with neighbouring holes merged."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self.holes = [(start, stop)] if stop > start else []

    def take(self, nbytes: int) -> int | None:
        for index, (start, stop) in enumerate(self.holes):
            if stop - start >= nbytes:
                if stop - start == nbytes:
                    del self.holes[index]
                else:
                    self.holes[index] = (start + nbytes, stop)
                return start
        return None

    def give(self, start: int, nbytes: int) -> None:
        index = bisect.bisect(self.holes, (start, start))
        stop = start + nbytes
        if index < len(self.holes) and self.holes[index][0] == stop:
            stop = self.holes.pop(index)[1]
        if index > 0 and self.holes[index - 1][1] == start:
            start = self.holes.pop(index - 1)[0]
            index -= 1
        self.holes.insert(index, (start, stop))


class SlotAllocator:
    """Slots of a pool of `nbytes`, whose last `reserve` bytes serve only callers that may use the reserve."""

    def __init__(self, nbytes: int, reserve: int, max_slots: int) -> None:
        reserve = align(reserve)
        if nbytes < 2 * reserve:
            raise ValueError(f"a pool of {nbytes} bytes is too small: it must hold two items of the largest size, {reserve} bytes each")
        self.nbytes, self.reserve, self.max_slots = nbytes, reserve, max_slots
        self._general = _Region(0, nbytes - reserve)
        self._reserved = _Region(nbytes - reserve, nbytes)
        self._free_indices = list(range(max_slots - 1, -1, -1))
        self._generations = [0] * max_slots
        self._used: dict[int, Slot] = {}

    def allocate(self, nbytes: int, use_reserve: bool = False) -> Slot | None:
        """A slot of at least `nbytes`, or None. Raises ValueError for more than the largest item the pool was made for."""
        nbytes = align(nbytes)
        if nbytes > self.reserve:
            raise ValueError(f"an item of {nbytes} bytes is larger than the pool's largest item, {self.reserve} bytes")
        if not self._free_indices:
            return None
        offset = self._general.take(nbytes)
        if offset is None and use_reserve:
            offset = self._reserved.take(nbytes)
        if offset is None:
            return None
        index = self._free_indices.pop()
        self._generations[index] += 1
        slot = Slot(index, self._generations[index], offset, nbytes)
        self._used[index] = slot
        return slot

    def free(self, slot: Slot) -> None:
        if self._used.get(slot.number) != slot:
            raise ValueError(f"slot {slot} is not in use")
        del self._used[slot.number]
        region = self._reserved if self.is_reserved(slot) else self._general
        region.give(slot.offset, slot.nbytes)
        self._free_indices.append(slot.number)

    def is_reserved(self, slot: Slot) -> bool:
        return slot.offset >= self._reserved.start

    @property
    def num_used(self) -> int:
        return len(self._used)

    def check_integrity(self) -> None:
        """Every byte is in exactly one hole or slot, every index free or used."""
        spans = sorted([(slot.offset, slot.offset + slot.nbytes) for slot in self._used.values()] + self._general.holes + self._reserved.holes)
        position = 0
        for start, stop in spans:
            assert start == position < stop, f"bytes {position} to {start} are lost or held twice"
            position = stop
        assert position == self.nbytes, f"the pool ends at {position}, not at {self.nbytes}"
        assert sorted([*self._free_indices, *self._used]) == list(range(self.max_slots)), "slot indices are lost or held twice"


def align(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(slots=True)
class OrderedSlots(Generic[K]):
    """Grants slots strictly in order; keeps the reserve for the oldest key that is expected and has none.

    A key is *expected* from the moment it is known, long before its data is there, so that a younger key whose data came
    earlier cannot take the place that the older one will need. `evict` frees something of no present use and says whether
    it did.
    """

    allocator: SlotAllocator
    evict: Callable[[], bool] = lambda: False
    _expected: list[tuple[Order, K]] = field(default_factory=list)
    _orders: dict[K, Order] = field(default_factory=dict)
    _waiting: list[tuple[Order, K]] = field(default_factory=list)
    _wanted: dict[K, int] = field(default_factory=dict)  # bytes, of the keys that wait

    def expect(self, key: K, order: Order) -> None:
        if key in self._orders:
            self.forget(key)
        self._orders[key] = order
        bisect.insort(self._expected, (order, key))

    def forget(self, key: K) -> None:
        """The key needs no slot (any more). Unknown keys are fine: a hit and a cancellation may cross."""
        if (order := self._orders.pop(key, None)) is not None:
            del self._expected[bisect.bisect_left(self._expected, (order, key))]
            if self._wanted.pop(key, None) is not None:
                del self._waiting[bisect.bisect_left(self._waiting, (order, key))]

    def request(self, key: K, nbytes: int) -> None:
        if key not in self._orders:
            raise ValueError(f"{key} asks for a slot but was not expected")
        if key not in self._wanted:
            bisect.insort(self._waiting, (self._orders[key], key))
        self._wanted[key] = nbytes

    def is_oldest(self, key: K) -> bool:
        return bool(self._expected) and self._expected[0][1] == key

    def grant(self) -> list[tuple[K, Slot]]:
        """Slots for waiting keys, oldest first, up to the first one that does not fit."""
        granted: list[tuple[K, Slot]] = []
        while self._waiting:
            key = self._waiting[0][1]
            slot = self.allocator.allocate(self._wanted[key], self.is_oldest(key))
            while slot is None and self.evict():
                slot = self.allocator.allocate(self._wanted[key], self.is_oldest(key))
            if slot is None:
                break
            self.forget(key)
            granted.append((key, slot))
        return granted
