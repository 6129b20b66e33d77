"""Decides what a ViT encodes next and whom it tells. Pure: no torch, no sockets, no clock.

A chunk is first asked for by hash. If it is in the cache it is leased at once. Else it waits: for pixels (whoever asked first
is asked for them), for a slot in the pool (granted in the global order), for its turn. Requests for one hash share one encode.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.messages import ChunkKey, GridTHW
from pipeline.slots import Order, OrderedSlots, Slot, SlotAllocator
from pipeline.tensors import TensorHandle
from workers.vit.feature_cache import Feature, FeatureCache


class NeedPixels(NamedTuple):
    key: ChunkKey


class PixelsDone(NamedTuple):
    key: ChunkKey


class Ready(NamedTuple):
    key: ChunkKey
    lease_id: int
    feature: Feature


class Refused(NamedTuple):
    key: ChunkKey
    reason: str


Action = NeedPixels | PixelsDone | Ready | Refused


@dataclass(slots=True)
class Pending:
    """One hash on its way into the cache."""

    mm_hash: bytes
    grid_thw: GridTHW
    supplier: ChunkKey  # who was asked for the pixels
    waiters: dict[ChunkKey, Order] = field(default_factory=dict)
    pixels: TensorHandle | None = None
    slot: Slot | None = None
    is_encoding: bool = False

    @property
    def order(self) -> Order:
        return min(self.waiters.values())


class Batcher:
    def __init__(self, allocator: SlotAllocator, bytes_per_token: int, merge_size: int) -> None:
        self.cache = FeatureCache(allocator)
        self._slots: OrderedSlots[bytes] = OrderedSlots(allocator, self.cache.evict_one)
        self._largest, self._bytes_per_token, self._merged = allocator.reserve, bytes_per_token, merge_size**2
        self._pending: dict[bytes, Pending] = {}
        self._hashes: dict[ChunkKey, bytes] = {}  # of the keys that wait

    def num_tokens(self, grid_thw: GridTHW) -> int:
        return grid_thw.num_patches // self._merged

    def on_request(self, key: ChunkKey, order: Order, mm_hash: bytes, grid_thw: GridTHW, pixels: TensorHandle | None) -> list[Action]:
        if (feature := self.cache.get(mm_hash)) is not None:
            is_answered = pixels is not None and key not in self._hashes  # these are the pixels of an encode shared meanwhile
            return [PixelsDone(key)] if is_answered else [Ready(key, self.cache.lease(feature), feature), PixelsDone(key)]
        if (size := self.num_tokens(grid_thw) * self._bytes_per_token) > self._largest:
            return [Refused(key, f"a chunk of {size} bytes of embeddings is larger than {self._largest}"), PixelsDone(key)]
        pending = self._pending.get(mm_hash)
        if pixels is not None:
            if pending is None or key not in pending.waiters or pending.pixels is not None:
                return [PixelsDone(key)]  # cancelled meanwhile, or somebody else's came first
            pending.pixels, pending.supplier = pixels, key
            self._slots.request(mm_hash, size)
            return []
        actions: list[Action] = []
        if pending is None:
            pending = self._pending[mm_hash] = Pending(mm_hash, grid_thw, supplier=key)
            actions.append(NeedPixels(key))
        pending.waiters[key] = order
        self._hashes[key] = mm_hash
        if pending.slot is None:
            self._expect(pending)
        return actions

    def _expect(self, pending: Pending) -> None:
        self._slots.expect(pending.mm_hash, pending.order)
        if pending.pixels is not None:
            self._slots.request(pending.mm_hash, self.num_tokens(pending.grid_thw) * self._bytes_per_token)

    def on_cancel(self, keys: Iterable[ChunkKey]) -> list[Action]:
        actions: list[Action] = []
        for key in keys:
            mm_hash = self._hashes.pop(key, None)
            if mm_hash is None:
                continue
            pending = self._pending[mm_hash]
            del pending.waiters[key]
            if pending.is_encoding:
                continue
            if not pending.waiters:
                self._drop(pending)
                actions.append(PixelsDone(key))
            elif pending.pixels is None and pending.supplier == key:
                pending.supplier = min(pending.waiters, key=lambda waiter: pending.waiters[waiter])
                actions.append(NeedPixels(pending.supplier))
                self._expect(pending)
            elif pending.slot is None:
                self._expect(pending)
        return actions

    def _drop(self, pending: Pending) -> None:
        del self._pending[pending.mm_hash]
        self._slots.forget(pending.mm_hash)
        if pending.slot is not None:
            self._slots.allocator.free(pending.slot)

    def next_batch(self, max_patches: int) -> list[Pending]:
        """Chunks to encode now, oldest first, at most `max_patches` together (one always goes, however large)."""
        for mm_hash, slot in self._slots.grant():
            self._pending[mm_hash].slot = slot
        batch: list[Pending] = []
        num_patches = 0
        waiting = [pending for pending in self._pending.values() if pending.slot is not None and not pending.is_encoding]
        for pending in sorted(waiting, key=lambda pending: pending.order):
            num_patches += pending.grid_thw.num_patches
            if batch and num_patches > max_patches:
                break
            pending.is_encoding = True
            batch.append(pending)
        return batch

    def on_encoded(self, batch: Iterable[Pending]) -> list[Action]:
        """The batch is in the pool: leases it to all who wait and keeps it."""
        actions: list[Action] = []
        for pending in batch:
            assert pending.slot is not None
            del self._pending[pending.mm_hash]
            feature = self.cache.add(pending.mm_hash, pending.slot, self.num_tokens(pending.grid_thw))
            for key in pending.waiters:
                del self._hashes[key]
                actions.append(Ready(key, self.cache.lease(feature), feature))
            actions.extend(PixelsDone(key) for key in {*pending.waiters, pending.supplier})
        return actions

    def on_failed(self, pending: Pending, reason: str) -> list[Action]:
        """The chunk cannot be encoded: tells all who wait and gives its slot back."""
        for key in pending.waiters:
            del self._hashes[key]
        self._drop(pending)
        keys = {*pending.waiters, pending.supplier}
        return [*(Refused(key, reason) for key in pending.waiters), *(PixelsDone(key) for key in keys)]

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        assert set(self._hashes) == {key for pending in self._pending.values() for key in pending.waiters}, "a waiter is lost"
