"""Slots of a pool with a content that other processes lease, and that is kept for the next who want it. Pure.

A content without a lease is evicted when its slot is needed, least recently used first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from pipeline.transport.slots import Slot, SlotAllocator
from pipeline.wire.topology import WorkerId

MISSES_BEFORE_FREED = 2  # lease sets without a lease, after which it counts as released
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class Leased(Generic[K, V]):
    key: K  # equal keys have equal contents
    slot: Slot
    value: V
    leases: set[int] = field(default_factory=set)


class _Lease(NamedTuple, Generic[K, V]):
    leased: Leased[K, V]
    holder: WorkerId


class LeasedSlots(Generic[K, V]):
    def __init__(self, allocator: SlotAllocator) -> None:
        self._allocator = allocator
        self._by_key: dict[K, Leased[K, V]] = {}  # least recently used first
        self._leases: dict[int, _Lease[K, V]] = {}
        self._missing: dict[int, int] = {}  # lease → lease sets that lacked it
        self._last_lease_id = 0

    def add(self, key: K, slot: Slot, value: V) -> Leased[K, V]:
        leased = self._by_key[key] = Leased(key, slot, value)
        return leased

    def get(self, key: K) -> Leased[K, V] | None:
        if (leased := self._by_key.pop(key, None)) is not None:
            self._by_key[key] = leased
        return leased

    def peek(self, key: K) -> Leased[K, V] | None:
        """Like `get`, without counting as a use."""
        return self._by_key.get(key)

    def lease(self, leased: Leased[K, V], holder: WorkerId) -> int:
        """A new lease: unique for the life of this process."""
        self._last_lease_id += 1
        leased.leases.add(self._last_lease_id)
        self._leases[self._last_lease_id] = _Lease(leased, holder)
        return self._last_lease_id

    def release(self, lease_ids: Iterable[int]) -> None:
        """Ends leases. An ended lease is ignored: a release and a lease set may end the same one."""
        for lease_id in lease_ids:
            self._missing.pop(lease_id, None)
            if (lease := self._leases.pop(lease_id, None)) is not None:
                lease.leased.leases.discard(lease_id)

    def release_all(self, holder: WorkerId) -> None:
        """Ends the leases of a worker that has died."""
        self.release([lease_id for lease_id, lease in self._leases.items() if lease.holder == holder])

    def reconcile(self, holder: WorkerId, held: Iterable[int], last_lease_id: int) -> None:
        """Ends leases whose release was lost: received by the holder, and missing in two of its lease
        sets."""
        known = set(held)
        for lease_id in [
            lease_id
            for lease_id, lease in self._leases.items()
            if lease.holder == holder and lease_id <= last_lease_id
        ]:
            if lease_id in known:
                self._missing.pop(lease_id, None)
                continue
            self._missing[lease_id] = self._missing.get(lease_id, 0) + 1
            if self._missing[lease_id] >= MISSES_BEFORE_FREED:
                self.release([lease_id])

    def evict_one(self) -> bool:
        """Evicts the least recently used content without a lease; False if there is none."""
        for leased in self._by_key.values():
            if not leased.leases:
                del self._by_key[leased.key]
                self._allocator.free(leased.slot)
                return True
        return False

    @property
    def num_kept(self) -> int:
        """Contents, leased or not."""
        return len(self._by_key)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def check_integrity(self) -> None:
        assert {lease for leased in self._by_key.values() for lease in leased.leases} == set(self._leases), (
            "leases are lost or held twice"
        )
        assert set(self._missing) <= set(self._leases), "a lease that has ended is still counted as missing"
        self._allocator.check_integrity()
