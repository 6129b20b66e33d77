"""The slots of a tensor pool, and the order in which they are granted. Pure: no memory, no torch, no sockets.

`SlotAllocator` cuts slots out of a block of bytes; `OrderedSlots` grants them, tenants in turn, in the order
(request arrival, item position). The last bytes of a pool are a reserve for the oldest item without a slot.
Without the reserve, requests with half of their items in a pool could deadlock; with it the oldest request
always gets its next item, and ends.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from pipeline.wire.base import Order

ALIGNMENT = 256  # bytes; enough for any dtype and for vector loads
MIN_SLOTS = 3  # of the largest size, in any pool
K = TypeVar("K", bound=Hashable)


class Slot(NamedTuple):
    number: int  # row of the pool's generation table
    generation: int
    offset: int  # bytes
    nbytes: int


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
            raise ValueError(
                f"a pool of {nbytes} bytes is too small: it must hold two items of the largest size, "
                f"{reserve} bytes each"
            )
        self.nbytes, self.reserve, self.max_slots = nbytes, reserve, max_slots
        self._general = _Region(0, nbytes - reserve)
        self._reserved = _Region(nbytes - reserve, nbytes)
        self._free_indices = list(range(max_slots - 1, -1, -1))
        self._generations = [0] * max_slots
        self._used: dict[int, Slot] = {}
        self._holders: dict[int, str] = {}  # of used slots, by number
        self.held: Counter[str] = Counter()  # bytes, by holder

    def allocate(
        self, nbytes: int, use_reserve: bool = False, holder: str = "", use_general: bool = True
    ) -> Slot | None:
        """A slot of at least `nbytes`, or None. The bytes count for `holder`.

        Raises ValueError for more than the largest item that the pool was made for.
        """
        nbytes = align(nbytes)
        if nbytes > self.reserve:
            raise ValueError(
                f"an item of {nbytes} bytes is larger than the pool's largest item, {self.reserve} bytes"
            )
        if not self._free_indices:
            return None
        offset = self._general.take(nbytes) if use_general else None
        if offset is None and use_reserve:
            offset = self._reserved.take(nbytes)
        if offset is None:
            return None
        index = self._free_indices.pop()
        self._generations[index] += 1
        slot = Slot(index, self._generations[index], offset, nbytes)
        self._used[index], self._holders[index] = slot, holder
        self.held[holder] += nbytes
        return slot

    def free(self, slot: Slot) -> None:
        if self._used.get(slot.number) != slot:
            raise ValueError(f"slot {slot} is not in use")
        del self._used[slot.number]
        holder = self._holders.pop(slot.number)
        self.held[holder] -= slot.nbytes
        if not self.held[holder]:
            del self.held[holder]
        region = self._reserved if self.is_reserved(slot) else self._general
        region.give(slot.offset, slot.nbytes)
        self._free_indices.append(slot.number)

    def is_reserved(self, slot: Slot) -> bool:
        return slot.offset >= self._reserved.start

    @property
    def num_used(self) -> int:
        return len(self._used)

    @property
    def num_used_bytes(self) -> int:
        return sum(self.held.values())

    def check_integrity(self) -> None:
        """Every byte is in exactly one hole or slot, every index free or used."""
        spans = sorted(
            [(slot.offset, slot.offset + slot.nbytes) for slot in self._used.values()]
            + self._general.holes
            + self._reserved.holes
        )
        position = 0
        for start, stop in spans:
            assert start == position < stop, f"bytes {position} to {start} are lost or held twice"
            position = stop
        assert position == self.nbytes, f"the pool ends at {position}, not at {self.nbytes}"
        assert sorted([*self._free_indices, *self._used]) == list(range(self.max_slots)), (
            "slot indices are lost or held twice"
        )


def align(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def pool_size(wanted: int, largest: int) -> int:
    """Bytes of a pool: those wanted, but at least `MIN_SLOTS` slots of `largest` bytes, an aligned size."""
    return align(max(wanted, MIN_SLOTS * largest))


@dataclass(slots=True)
class _Expected:
    order: Order
    tenant: str
    may_use_reserve: bool
    nbytes: int = 0  # 0: no slot is asked for yet


class OrderedSlots(Generic[K]):
    """Grants slots in order within a tenant; the reserve serves only the oldest expected key without a slot.

    A key is *expected* as soon as it is known, long before its data arrives, so that a younger key whose data
    arrives earlier cannot take the reserve. Where keys become known with their data only, another has to say
    which of them `may_use_reserve`. The rest of the pool goes to the tenant that holds the fewest
    bytes of it: a tenant with a long queue delays its own keys only. `evict` frees an unused slot, and
    returns whether it did.
    """

    def __init__(self, allocator: SlotAllocator, evict: Callable[[], bool] = lambda: False) -> None:
        self.allocator, self._evict = allocator, evict
        self._keys: dict[K, _Expected] = {}
        self._expected: list[tuple[Order, K]] = []  # in order
        self._waiting: dict[str, list[tuple[Order, K]]] = {}  # by tenant, in order: those that ask
        # the key that did not fit: it goes before keys of tenants that hold as many bytes
        self._turn: K | None = None

    def expect(self, key: K, order: Order, tenant: str = "", may_use_reserve: bool = True) -> None:
        if key in self._keys:
            self.forget(key)
        self._keys[key] = _Expected(order, tenant, may_use_reserve)
        if may_use_reserve:
            bisect.insort(self._expected, (order, key))

    def let_use_reserve(self, key: K) -> None:
        known = self._keys[key]
        if not known.may_use_reserve:
            known.may_use_reserve = True
            bisect.insort(self._expected, (known.order, key))

    def forget(self, key: K) -> None:
        """The key needs no slot (any more). Unknown keys are ignored: a hit and a cancellation may cross."""
        if (known := self._keys.pop(key, None)) is None:
            return
        if known.may_use_reserve:
            _remove(self._expected, (known.order, key))
        if known.nbytes:
            _remove(self._waiting[known.tenant], (known.order, key))
            if not self._waiting[known.tenant]:
                del self._waiting[known.tenant]

    def request(self, key: K, nbytes: int) -> None:
        if (known := self._keys.get(key)) is None:
            raise ValueError(f"{key} asks for a slot but was not expected")
        if not known.nbytes:
            bisect.insort(self._waiting.setdefault(known.tenant, []), (known.order, key))
        known.nbytes = nbytes

    def is_oldest(self, key: K) -> bool:
        return bool(self._expected) and self._expected[0][1] == key

    def grant(self) -> list[tuple[K, Slot]]:
        """Slots for waiting keys, up to the first that does not fit; the oldest may use the reserve."""
        granted: list[tuple[K, Slot]] = []
        while (found := self._next()) is not None:
            key, slot = found
            self.forget(key)
            granted.append((key, slot))
        return granted

    def _next(self) -> tuple[K, Slot] | None:
        if not self._waiting:
            return None
        heads = [
            (self.allocator.held[tenant], waiting[0][1] != self._turn, *waiting[0])
            for tenant, waiting in self._waiting.items()
        ]
        key = min(heads, key=lambda head: head[:3])[3]
        slot = self._allocate(key)
        self._turn = key if slot is None else None
        if slot is not None:
            return key, slot
        if not self._expected:
            return None
        oldest = self._expected[0][1]
        if self._keys[oldest].nbytes and (slot := self._allocate(oldest, use_general=False)) is not None:
            return oldest, slot
        return None

    def _allocate(self, key: K, use_general: bool = True) -> Slot | None:
        known = self._keys[key]
        wanted = known.nbytes, self.is_oldest(key), known.tenant, use_general
        slot = self.allocator.allocate(*wanted)
        while slot is None and self._evict():
            slot = self.allocator.allocate(*wanted)
        return slot


def _remove(sorted_list: list[tuple[Order, K]], entry: tuple[Order, K]) -> None:
    del sorted_list[bisect.bisect_left(sorted_list, entry)]
