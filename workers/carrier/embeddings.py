"""Embeddings on the way from ViTs of other nodes to the LLM groups of this node. Pure but for the memory.

A ViT leases an embedding to this carrier, which copies it into a slot of its own, leases the copy to the
group's lead, and releases the ViT's. Copies are kept for the next request with the same content. Slots are
granted in the global order; only a chunk that its lead names, or an older one, may use the reserve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import assert_never

import msgspec

from pipeline.transport.ends import Sink
from pipeline.transport.leased_slots import Leased, LeasedSlots
from pipeline.transport.slots import OrderedSlots, Slot, SlotAllocator
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, Order, Origin, PoolOpened
from pipeline.wire.encoding import LeaseReleased, LeaseSet
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.generation import EmbeddingReady, EncodeFailed, LeaseRefused, LlmMessage
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import Role, WorkerId
from workers.carrier.reads import Read, Reads

LeaseMessage = LeaseReleased | LeaseSet


@dataclass(slots=True, eq=False)
class WantedCopy:
    """An embedding that is not copied yet. The ViT's lease is held meanwhile."""

    message: EmbeddingReady
    slot: Slot | None = None

    @property
    def name(self) -> tuple[ChunkKey, int]:
        """Choices of one request may want the same chunk."""
        return self.message.key, self.message.lease_id

    @property
    def vit(self) -> WorkerId:
        return self.message.sender


# By the handle of the original, since a slot's generation has one content. One in the reserve is for its
# request alone: a younger request that leased it could block the oldest.
CopyKey = TensorHandle | WantedCopy
Copy = Leased[CopyKey, TensorHandle]


class EmbeddingCopies:
    """`llms`: the sinks to this node's leads, by rank; `vits`: to the ViTs of other nodes. `epoch_of` gives
    the last known epoch of a worker, `node_of` its node."""

    def __init__(
        self, origin: Origin, pool: TensorPool, allocator: SlotAllocator,
        llms: Mapping[int, Sink[LlmMessage]], vits: Mapping[WorkerId, Sink[LeaseMessage]], reads: Reads,
        epoch_of: Callable[[WorkerId], int], node_of: Callable[[WorkerId], int],
    ) -> None:  # fmt: skip
        self._origin, self.pool, self.allocator = origin, pool, allocator
        self._llms, self._vits, self._reads = llms, vits, reads
        self._epoch_of, self._node_of = epoch_of, node_of
        self.copies: LeasedSlots[CopyKey, TensorHandle] = LeasedSlots(allocator)
        self._slots: OrderedSlots[tuple[ChunkKey, int]] = OrderedSlots(allocator, self.copies.evict_one)
        self._wanted: dict[tuple[ChunkKey, int], WantedCopy] = {}
        self._oldest: dict[int, Order | None] = {}  # by lead: what it waits for
        self._last_seen: dict[WorkerId, tuple[int, int]] = {}  # by ViT: epoch and lease id
        self._num_abandoned = 0  # slots whose read goes on for nobody
        self.num_hits = 0

    def announce_to(self, lead: int) -> None:
        self._llms[lead].send(PoolOpened(pool=self.pool.info, **self._origin))

    # From ViTs.

    def on_ready(self, message: EmbeddingReady) -> None:
        seen = message.epoch, message.lease_id
        self._last_seen[message.sender] = max(self._last_seen.get(message.sender, (0, 0)), seen)
        if (copy := self.copies.get(message.embeddings)) is not None:
            self.num_hits += 1
            self.release(message)
            self._hand_on(message, copy)
            return
        wanted, size = WantedCopy(message), message.embeddings.nbytes
        if size > self.allocator.reserve:
            reason = f"an embedding of {size} bytes is larger than {self.allocator.reserve}"
            self.release(message)
            failed = EncodeFailed(key=message.key, error=ErrorInfo(400, reason, "messages"), **self._origin)
            self._llms[message.key.lead].send(failed)
        elif message.order is None:
            self._read_again(wanted)
        else:
            self._wanted[wanted.name] = wanted
            self._slots.expect(wanted.name, message.order, may_use_reserve=self._is_awaited(message))
            self._slots.request(wanted.name, size)
            self._grant()

    def _read_again(self, wanted: WantedCopy) -> None:
        """A preempted request needs it again. It does not wait: it would hold blocks of the KV cache."""
        size = wanted.message.embeddings.nbytes
        slot = self.allocator.allocate(size)
        while slot is None and self.copies.evict_one():
            slot = self.allocator.allocate(size)
        if slot is None:
            self._refuse(wanted.message)
            return
        self._wanted[wanted.name] = wanted
        self._read(wanted, slot)

    def _is_awaited(self, message: EmbeddingReady) -> bool:
        oldest = self._oldest.get(message.key.lead)
        return message.order is not None and oldest is not None and message.order <= oldest

    def pass_on(self, message: EncodeFailed | LeaseRefused) -> None:
        self._llms[message.key.lead].send(msgspec.structs.replace(message, **self._origin))

    # The copies.

    def _grant(self) -> None:
        for name, slot in self._slots.grant():
            wanted = self._wanted[name]
            if (copy := self.copies.get(wanted.message.embeddings)) is not None:  # another's read was faster
                del self._wanted[name]
                self.allocator.free(slot)
                self.num_hits += 1
                self.release(wanted.message)
                self._hand_on(wanted.message, copy)
                continue
            self._read(wanted, slot)

    def _read(self, wanted: WantedCopy, slot: Slot) -> None:
        source, wanted.slot = wanted.message.embeddings, slot
        target = self.pool.lend(slot, source.shape, source.dtype)
        on_end = functools.partial(self._on_end, wanted, target)
        self._reads.begin(Read(self._node_of(wanted.vit), source, self.pool, target, on_end))

    def _on_end(self, wanted: WantedCopy, target: TensorHandle, is_there: bool) -> None:
        message, slot = wanted.message, wanted.slot
        assert slot is not None
        if self._wanted.get(wanted.name) is not wanted:  # dropped while it was read
            self._num_abandoned -= 1
            self.allocator.free(slot)
        elif not is_there:
            del self._wanted[wanted.name]
            self.allocator.free(slot)
            self._refuse(message)
        else:
            del self._wanted[wanted.name]
            key: CopyKey = wanted if self.allocator.is_reserved(slot) else message.embeddings
            copy = self.copies.get(key)
            if copy is None:
                copy = self.copies.add(key, slot, target)
            else:  # another's read was faster
                self.allocator.free(slot)
            self.release(message)
            self._hand_on(message, copy)
        self._grant()

    def _hand_on(self, message: EmbeddingReady, copy: Copy) -> None:
        lead = message.key.lead
        lease_id = self.copies.lease(copy, WorkerId(Role.LLM, lead))
        self._llms[lead].send(
            msgspec.structs.replace(
                message, lease_id=lease_id, embeddings=copy.value, sent_at=0.0, **self._origin
            )
        )

    def _refuse(self, message: EmbeddingReady) -> None:
        """The lead interrupts the request."""
        self.release(message)
        self._llms[message.key.lead].send(LeaseRefused(key=message.key, **self._origin))

    def release(self, message: EmbeddingReady) -> None:
        """Ends the ViT's lease, unless it ended with the ViT."""
        if message.epoch >= self._epoch_of(message.sender):
            self._vits[message.sender].send(LeaseReleased(lease_ids=(message.lease_id,), **self._origin))

    def _drop(self, wanted: WantedCopy) -> None:
        del self._wanted[wanted.name]
        self._slots.forget(wanted.name)
        self.release(wanted.message)
        if wanted.slot is not None:
            self._num_abandoned += 1  # the slot is free when nothing is written to it any more

    # From leads.

    def on_released(self, message: LeaseMessage) -> None:
        match message:
            case LeaseReleased():
                self.copies.release(message.lease_ids)
            case LeaseSet():
                self.copies.reconcile(message.sender, message.lease_ids, message.last_lease_id)
            case _:
                assert_never(message)
        self._grant()

    def on_awaited(self, lead: int, order: Order | None) -> None:
        self._oldest[lead] = order
        for wanted in self._wanted.values():
            if wanted.slot is None and wanted.message.key.lead == lead and self._is_awaited(wanted.message):
                self._slots.let_use_reserve(wanted.name)
        self._grant()

    # Deaths.

    def on_vit_death(self, vit: WorkerId) -> None:
        """Its leases are void. The leads interrupt the requests that wait for its embeddings."""
        self._last_seen.pop(vit, None)
        for wanted in [wanted for wanted in self._wanted.values() if wanted.vit == vit]:
            self._drop(wanted)
        self._grant()

    def on_group_death(self, lead: int) -> None:
        self._oldest.pop(lead, None)
        self.copies.release_all(WorkerId(Role.LLM, lead))
        for wanted in [wanted for wanted in self._wanted.values() if wanted.message.key.lead == lead]:
            self._drop(wanted)
        self._grant()
        self.announce_to(lead)

    def send_sets(self) -> None:
        """Tells each ViT which of its leases this carrier holds, so that a lost release heals."""
        for vit, sink in self._vits.items():
            epoch, last_lease_id = self._last_seen.get(vit, (0, 0))
            held = [wanted.message for wanted in self._wanted.values() if wanted.vit == vit]
            lease_ids = tuple(message.lease_id for message in held if message.epoch == epoch)
            sink.send(LeaseSet(lease_ids=lease_ids, last_lease_id=last_lease_id, **self._origin))

    @property
    def num_wanted(self) -> int:
        return len(self._wanted)

    def check_integrity(self) -> None:
        self.copies.check_integrity()
        num_held = self._num_abandoned + sum(wanted.slot is not None for wanted in self._wanted.values())
        assert self.allocator.num_used == num_held + self.copies.num_kept, "slots are held by nobody"
