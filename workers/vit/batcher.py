"""Decides which chunks a ViT encodes next, and which requests get them. Pure: no torch, no sockets, no clock.

A chunk is first requested by hash. A cached chunk is leased at once. Otherwise it waits for its pixels
(requested from the first waiter, unless they follow by themselves), for a slot in the pool (granted in the
global order), and for its turn. Requests for one hash share one encode.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.families import EmbeddingSpec
from pipeline.process.quarantine import nobody
from pipeline.transport.fair import FairQueue
from pipeline.transport.leased_slots import Leased, LeasedSlots
from pipeline.transport.slots import OrderedSlots, Slot, SlotAllocator
from pipeline.wire.base import ChunkKey, GridTHW, Order
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import Role, WorkerId

LEASED_TO_LEAD = functools.partial(WorkerId, Role.LLM)
Feature = Leased[bytes, EmbeddingSpec]  # an encoded chunk in the pool, by the hash of its content


class NeedPixels(NamedTuple):
    key: ChunkKey


class PixelsDone(NamedTuple):
    key: ChunkKey


class Ready(NamedTuple):
    key: ChunkKey
    lease_id: int
    feature: Feature
    was_encoded: bool = False  # since the waiter came; else it was in the cache
    order: Order | None = None  # None: it was leased before


class LeaseGone(NamedTuple):
    key: ChunkKey


class Refused(NamedTuple):
    key: ChunkKey
    reason: str


Action = NeedPixels | PixelsDone | Ready | LeaseGone | Refused


@dataclass(slots=True)
class Pending:
    """One hash that is not leased yet to all of its waiters."""

    mm_hash: bytes
    grid_thw: GridTHW
    supplier: ChunkKey | None = None  # the waiter whose pixels are used; None while the chunk is parked
    waiters: dict[ChunkKey, Order] = field(default_factory=dict)
    pixels: TensorHandle | None = None
    sent_at: float = 0.0  # the pixels
    slot: Slot | None = None
    tenant: str = ""  # of the first waiter: the encode takes this tenant's turn
    adapter: str = ""  # of the tower; the hash tells it apart
    found: set[ChunkKey] = field(default_factory=set)  # waiters that came when it was cached
    is_encoding: bool = False

    @property
    def oldest(self) -> ChunkKey:
        return min(self.waiters, key=lambda key: self.waiters[key])

    @property
    def order(self) -> Order:
        return self.waiters[self.oldest]


class Batcher:
    """`embedding_of` gives the shape and size of a grid's embedding. A chunk of a request for which
    `runs_alone` (it is quarantined) is a batch of its own. `holder_of` names the worker that holds the
    leases for an LLM group, by the group's lead."""

    def __init__(
        self, allocator: SlotAllocator, embedding_of: Callable[[GridTHW], EmbeddingSpec],
        runs_alone: Callable[[str], bool] = nobody,
        holder_of: Callable[[int], WorkerId] = LEASED_TO_LEAD,
    ) -> None:  # fmt: skip
        self.cache: LeasedSlots[bytes, EmbeddingSpec] = LeasedSlots(allocator)
        self.allocator, self._holder_of = allocator, holder_of
        self.num_queries = self.num_hits = 0  # of the cache
        self._slots: OrderedSlots[bytes] = OrderedSlots(allocator, self.cache.evict_one)
        self._largest, self.embedding_of = allocator.reserve, embedding_of
        self._runs_alone = runs_alone
        self._pending: dict[bytes, Pending] = {}
        # Pending chunks with pixels and a slot, by tenant and request.
        self._queue: FairQueue[tuple[str, int], Pending] = FairQueue()
        # pending chunks that lie encoded in the reserve (see `poll`)
        self._parked: set[bytes] = set()
        self._hashes: dict[ChunkKey, bytes] = {}  # by waiter

    def on_request(
        self,
        key: ChunkKey,
        order: Order,
        mm_hash: bytes,
        grid_thw: GridTHW,
        pixels: TensorHandle | None,
        tenant: str = "",
        will_follow: bool = False,
        sent_at: float = 0.0,
        adapter: str = "",
    ) -> list[Action]:
        """`will_follow`: the pixels come without being asked for. `sent_at`: when they were sent."""
        if (size := self.embedding_of(grid_thw).nbytes) > self._largest:
            reason = f"a chunk of {size} bytes of embeddings is larger than {self._largest}"
            return [Refused(key, reason), PixelsDone(key)]
        if pixels is not None:
            return self._on_pixels(key, mm_hash, pixels, sent_at)
        self.num_queries += 1
        feature = self.cache.get(mm_hash)
        self.num_hits += feature is not None
        if feature is not None and not self._slots.allocator.is_reserved(feature.slot):
            return [Ready(key, self._lease(feature, key), feature, order=order), PixelsDone(key)]
        actions: list[Action] = []
        pending = self._pending.get(mm_hash)
        if pending is None:
            pending = self._pending[mm_hash] = Pending(
                mm_hash, grid_thw, tenant=tenant, adapter=adapter
            )  # fmt: skip
            if feature is not None:
                self._parked.add(mm_hash)
            else:
                pending.supplier = key
                if not will_follow:
                    actions.append(NeedPixels(key))
        pending.waiters[key] = order
        if feature is not None:
            pending.found.add(key)
        self._hashes[key] = mm_hash
        if pending.slot is None:
            self._expect(pending)
        return [*actions, *self.poll()]

    def on_lease_request(self, key: ChunkKey, mm_hash: bytes) -> list[Action]:
        """Leases a chunk again that was leased for this key before. Requests no pixels."""
        feature = self.cache.get(mm_hash)
        if feature is None or self._slots.allocator.is_reserved(feature.slot):
            return [LeaseGone(key)]
        return [Ready(key, self._lease(feature, key), feature)]

    def _lease(self, feature: Feature, key: ChunkKey) -> int:
        return self.cache.lease(feature, self._holder_of(key.lead))

    def _on_pixels(self, key: ChunkKey, mm_hash: bytes, pixels: TensorHandle, sent_at: float) -> list[Action]:
        pending = self._pending.get(mm_hash)
        if pending is None or key not in pending.waiters:
            return [PixelsDone(key)]  # answered from the cache or cancelled meanwhile
        if pending.pixels is not None:
            # another waiter's pixels came first; these are released when their own request is answered
            return []
        pending.pixels, pending.supplier, pending.sent_at = pixels, key, sent_at
        self._expect(pending)
        return []

    def poll(self) -> list[Action]:
        """Leases chunks that lie in the reserve. To be called whenever a lease has ended or a slot was
        granted.

        The reserve must become free for the oldest item. So a chunk there is leased only to a waiter that is
        the oldest of all; its other waiters stay parked, as for a chunk that is not encoded. If the chunk is
        evicted, they need pixels again.
        """
        actions: list[Action] = []
        for mm_hash in list(self._parked):
            pending, feature = self._pending[mm_hash], self.cache.peek(mm_hash)
            while feature is not None and pending.waiters and self._slots.is_oldest(mm_hash):
                actions.extend(self._serve(pending, pending.oldest, feature))
            if not pending.waiters:
                actions.extend(self._drop(pending))
            elif feature is None:
                self._parked.discard(mm_hash)
                if pending.pixels is None:
                    pending.supplier = pending.oldest
                    actions.append(NeedPixels(pending.supplier))
                self._expect(pending)
        return actions

    def _serve(self, pending: Pending, key: ChunkKey, feature: Feature) -> list[Action]:
        order = pending.waiters.pop(key)
        del self._hashes[key]
        if pending.waiters:
            self._expect(pending)
        done = [] if key == pending.supplier and pending.waiters else [PixelsDone(key)]
        was_encoded = key not in pending.found
        return [Ready(key, self._lease(feature, key), feature, was_encoded, order), *done]

    def _expect(self, pending: Pending) -> None:
        self._slots.expect(pending.mm_hash, pending.order, pending.tenant)
        if pending.pixels is not None and pending.mm_hash not in self._parked:
            self._slots.request(pending.mm_hash, self.embedding_of(pending.grid_thw).nbytes)

    # Every key gets exactly one PixelsDone, when it is answered, refused or cancelled; a supplier's comes
    # when the other waiters are answered, too.

    def on_cancel(self, keys: Iterable[ChunkKey]) -> list[Action]:
        actions: list[Action] = []
        for key in keys:
            mm_hash = self._hashes.pop(key, None)
            if mm_hash is None:
                continue
            pending = self._pending[mm_hash]
            del pending.waiters[key]
            if pending.pixels is None or pending.supplier != key:
                actions.append(PixelsDone(key))  # a supplier's pixels may serve other waiters
            if pending.is_encoding:
                continue
            if not pending.waiters:
                actions.extend(self._drop(pending))
                continue
            if pending.pixels is None and pending.supplier == key:
                pending.supplier = pending.oldest
                actions.append(NeedPixels(pending.supplier))
            if pending.slot is None:
                self._expect(pending)
        return [*actions, *self.poll()]

    def _drop(self, pending: Pending) -> list[Action]:
        """Drops a chunk without waiters, and releases its supplier's pixels, even of a cancelled supplier."""
        del self._pending[pending.mm_hash]
        self._parked.discard(pending.mm_hash)
        self._slots.forget(pending.mm_hash)
        if pending.slot is not None:
            self._slots.allocator.free(pending.slot)
        return (
            [PixelsDone(pending.supplier)]
            if pending.pixels is not None and pending.supplier is not None
            else []
        )

    def next_batch(self, max_patches: int) -> list[Pending]:
        """Chunks to encode now: tenants in turn, and within a tenant its requests. At most `max_patches`
        together, but at least one chunk."""
        for mm_hash, slot in self._slots.grant():
            granted = self._pending[mm_hash]
            granted.slot = slot
            cost = granted.grid_thw.num_patches
            self._queue.push(granted.tenant, granted.oldest[:2], cost, granted.order, granted)
        batch: list[Pending] = []
        num_patches = 0
        while (pending := self._queue.peek()) is not None:
            if self._pending.get(pending.mm_hash) is not pending:  # dropped: it has no waiters any more
                self._queue.drop()
                continue
            num_patches += pending.grid_thw.num_patches
            is_alone = any(self._runs_alone(key.request_id) for key in pending.waiters)
            if batch and (num_patches > max_patches or is_alone):
                break
            self._queue.pop()
            pending.is_encoding = True
            batch.append(pending)
            if is_alone:
                break
        return batch

    def on_encoded(self, batch: Iterable[Pending]) -> list[Action]:
        """The batch is in the pool: adds it to the cache, and leases it to its waiters."""
        actions: list[Action] = []
        for pending in batch:
            assert pending.slot is not None
            assert pending.supplier is not None
            feature = self.cache.add(pending.mm_hash, pending.slot, self.embedding_of(pending.grid_thw))
            waiters = sorted(pending.waiters, key=lambda key: pending.waiters[key])
            served = waiters[:1] if self._slots.allocator.is_reserved(pending.slot) else waiters
            pending.found.clear()
            for key in served:
                del self._hashes[key]
                order = pending.waiters.pop(key)
                actions.append(Ready(key, self._lease(feature, key), feature, True, order))
            pending.slot, pending.is_encoding = None, False
            # the supplier waits for the reserve: if the chunk is evicted, its pixels are needed again
            if pending.supplier in pending.waiters:
                actions.extend(PixelsDone(key) for key in served)
            else:
                actions.extend(PixelsDone(key) for key in sorted({*served, pending.supplier}))
                pending.pixels = pending.supplier = None
            if pending.waiters:
                self._parked.add(pending.mm_hash)
                self._expect(pending)
            else:
                del self._pending[pending.mm_hash]
        return [*actions, *self.poll()]

    def on_failed(self, pending: Pending, reason: str) -> list[Action]:
        """The chunk cannot be encoded: refuses all waiters and frees its slot."""
        for key in pending.waiters:
            del self._hashes[key]
        refused = [Refused(key, reason) for key in pending.waiters]
        done = [PixelsDone(key) for key in pending.waiters if key != pending.supplier]
        return [*refused, *done, *self._drop(pending)]

    def forget_group(self, lead: int) -> list[Action]:
        """An LLM group has died: ends its requests, and its leases unless another holds them."""
        self.cache.release_all(WorkerId(Role.LLM, lead))
        return self.on_cancel([key for key in self._hashes if key.lead == lead])

    def forget_all(self) -> list[Action]:
        """Who sent the pixels has died: drops all waiters. A batch that is being encoded goes on."""
        actions = self.on_cancel(list(self._hashes))
        return [action for action in actions if isinstance(action, PixelsDone)]

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def check_integrity(self) -> None:
        self.cache.check_integrity()
        assert self._parked <= set(self._pending), "a parked chunk is lost"
        assert set(self._hashes) == {key for pending in self._pending.values() for key in pending.waiters}, (
            "a waiter is lost"
        )
