"""Encoded chunks in the ViT's pool: leased to the LLM, or kept for the next request with the same content.

Pure. A chunk without a lease is evicted when its slot is needed, least recently used first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.families import EmbeddingSpec
from pipeline.transport.slots import Slot, SlotAllocator

MISSES_BEFORE_FREED = 2  # lease sets without a lease, after which it counts as released


@dataclass(slots=True)
class Feature:
    mm_hash: bytes
    slot: Slot
    embedding: EmbeddingSpec
    leases: set[int] = field(default_factory=set)


class FeatureLease(NamedTuple):
    feature: Feature
    lead: int  # the LLM rank that holds it


class FeatureCache:
    def __init__(self, allocator: SlotAllocator) -> None:
        self._allocator = allocator
        self._features: dict[bytes, Feature] = {}  # least recently used first
        self._leases: dict[int, FeatureLease] = {}
        self._missing: dict[int, int] = {}  # lease → lease sets that lacked it
        self._last_lease_id = 0

    def add(self, mm_hash: bytes, slot: Slot, embedding: EmbeddingSpec) -> Feature:
        feature = self._features[mm_hash] = Feature(mm_hash, slot, embedding)
        return feature

    def get(self, mm_hash: bytes) -> Feature | None:
        if (feature := self._features.pop(mm_hash, None)) is not None:
            self._features[mm_hash] = feature
        return feature

    def peek(self, mm_hash: bytes) -> Feature | None:
        """Like `get`, without counting as a use."""
        return self._features.get(mm_hash)

    def lease(self, feature: Feature, lead: int) -> int:
        """A new lease: unique for the life of this process."""
        self._last_lease_id += 1
        feature.leases.add(self._last_lease_id)
        self._leases[self._last_lease_id] = FeatureLease(feature, lead)
        return self._last_lease_id

    def release(self, lease_ids: Iterable[int]) -> None:
        """Ends leases. An ended lease is ignored: a release and a lease set may end the same one."""
        for lease_id in lease_ids:
            self._missing.pop(lease_id, None)
            if (lease := self._leases.pop(lease_id, None)) is not None:
                lease.feature.leases.discard(lease_id)

    def release_all(self, lead: int) -> None:
        """Ends the leases of an LLM group that has died."""
        self.release([lease_id for lease_id, lease in self._leases.items() if lease.lead == lead])

    def reconcile(self, lead: int, held: Iterable[int], last_lease_id: int) -> None:
        """Ends leases whose release was lost: received by the holder, and missing in two of its lease
        sets."""
        known = set(held)
        for lease_id in [
            lease_id
            for lease_id, lease in self._leases.items()
            if lease.lead == lead and lease_id <= last_lease_id
        ]:
            if lease_id in known:
                self._missing.pop(lease_id, None)
                continue
            self._missing[lease_id] = self._missing.get(lease_id, 0) + 1
            if self._missing[lease_id] >= MISSES_BEFORE_FREED:
                self.release([lease_id])

    def evict_one(self) -> bool:
        """Evicts the least recently used feature without a lease; False if there is none."""
        for feature in self._features.values():
            if not feature.leases:
                del self._features[feature.mm_hash]
                self._allocator.free(feature.slot)
                return True
        return False

    @property
    def num_features(self) -> int:
        return len(self._features)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    def check_integrity(self) -> None:
        assert {lease for feature in self._features.values() for lease in feature.leases} == set(
            self._leases
        ), "leases are lost or held twice"
        assert set(self._missing) <= set(self._leases), "a lease that has ended is still counted as missing"
        self._allocator.check_integrity()
