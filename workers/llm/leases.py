"""Rank 0's leases on embeddings: those whose request or pool is not here yet, and the messages to the owners
of pools: ViTs, and the carrier that copies embeddings of other nodes.

Only rank 0 holds and releases leases. When the result of a step is here, every rank has gathered what the
step read (the gather precedes the first all-reduce), so a chunk is released as soon as its tokens are
computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pipeline.transport.ends import Sink
from pipeline.wire.base import ChunkKey, Order, Origin
from pipeline.wire.carrying import CarryMessage, OldestAwaited
from pipeline.wire.encoding import EncodeMessage, LeaseReleased, LeaseRequest, LeaseSet
from pipeline.wire.generation import EmbeddingReady, EncodeFailed
from pipeline.wire.topology import Role, WorkerId
from workers.llm.chunk import Chunk, Lease
from workers.llm.request import Request

LEASE_SET_INTERVAL_S = 1.0
MEMORY_OF_EARLY_S = 60.0


def lease_of(message: EmbeddingReady) -> Lease:
    return Lease(message.sender, message.epoch, message.lease_id)


class Leases:
    """`vits` are the sinks to the ViTs, by index; `carrier` is that of this node, if there is one."""

    def __init__(
        self, origin: Origin, vits: Sequence[Sink[EncodeMessage]],
        carrier: tuple[WorkerId, Sink[CarryMessage]] | None = None,
    ) -> None:  # fmt: skip
        self._origin, self._vits = origin, vits
        self._carrier = None if carrier is None else carrier[1]
        self._owners: dict[WorkerId, Sink[LeaseReleased | LeaseSet]] = {
            WorkerId(Role.VIT, index): vit for index, vit in enumerate(vits)
        }
        if carrier is not None:
            self._owners[carrier[0]] = carrier[1]
        self._told_awaited: tuple[Order | None, ...] = ()  # the last word to the carrier, if there was one
        # By request id: messages about requests or attempts not here yet, with their arrival times.
        self._early: dict[str, list[tuple[float, EmbeddingReady | EncodeFailed]]] = {}
        self._unmapped: list[EmbeddingReady] = []  # their pools are not here yet
        # By owner: epoch and lease id. A successor counts from one again.
        self._last_seen = dict.fromkeys(self._owners, (0, 0))
        self._lease_set_due = 0.0
        self._num_more: Counter[Lease] = Counter()  # requests that hold the lease, beyond the first

    @property
    def has_carrier(self) -> bool:
        return self._carrier is not None

    def saw(self, message: EmbeddingReady) -> None:
        owner = message.sender
        self._last_seen[owner] = max(self._last_seen[owner], (message.epoch, message.lease_id))

    def forget_owner(self, owner: WorkerId, epoch: int) -> None:
        """A ViT or a carrier has died: its leases are void. `epoch` is its successor's."""
        if owner not in self._owners:
            return

        def is_alive(message: EmbeddingReady | EncodeFailed) -> bool:
            return message.sender != owner or message.epoch >= epoch

        self._last_seen[owner] = max(self._last_seen[owner], (epoch, 0))
        if owner.role is Role.CARRIER:
            self._told_awaited = ()  # its successor knows nothing
        self._unmapped = [message for message in self._unmapped if is_alive(message)]
        for lease in [lease for lease in self._num_more if lease.owner == owner and lease.epoch < epoch]:
            del self._num_more[lease]
        for request_id, early in list(self._early.items()):
            self._early[request_id] = [(time, message) for time, message in early if is_alive(message)]
            if not self._early[request_id]:
                del self._early[request_id]

    def keep_unmapped(self, message: EmbeddingReady) -> None:
        self._unmapped.append(message)

    def take_unmapped(self) -> list[EmbeddingReady]:
        unmapped, self._unmapped = self._unmapped, []
        return unmapped

    def keep_early(self, message: EmbeddingReady | EncodeFailed, now: float) -> None:
        """Keeps a ViT's message about an attempt that is not here yet: the ViT's connection may be faster
        than that of preprocess."""
        self._early.setdefault(message.key.request_id, []).append((now, message))

    def take_early(self, request_id: str) -> list[EmbeddingReady | EncodeFailed]:
        return [message for _, message in self._early.pop(request_id, ())]

    def drop_early(self, request_id: str, attempt: int) -> None:
        """Drops early messages about attempts up to this one, which never run here. A later one still may."""
        early = self._early.pop(request_id, [])
        if later := [(time, message) for time, message in early if message.key.attempt > attempt]:
            self._early[request_id] = later
        dropped = [message for _, message in early if message.key.attempt <= attempt]
        self.release([lease_of(message) for message in dropped if isinstance(message, EmbeddingReady)])

    def forget_early(self, now: float) -> None:
        """Releases embeddings whose request has not arrived in `MEMORY_OF_EARLY_S`."""
        for request_id, early in list(self._early.items()):
            if now - early[0][0] >= MEMORY_OF_EARLY_S:
                self.drop_early(request_id, early[0][1].key.attempt)

    def share(self, lease: Lease, num_more: int) -> None:
        """`num_more` further requests hold this lease. It is released when the last of them releases it."""
        if num_more:
            self._num_more[lease] += num_more

    def release(self, leases: Iterable[Lease]) -> None:
        by_owner: dict[WorkerId, list[int]] = defaultdict(list)
        for lease in leases:
            if num_more := self._num_more.pop(lease, 0):
                self.share(lease, num_more - 1)
                continue
            if lease.epoch >= self._last_seen[lease.owner][0]:  # else the lease ended with its owner
                by_owner[lease.owner].append(lease.lease_id)
        for owner, lease_ids in by_owner.items():
            self._owners[owner].send(LeaseReleased(lease_ids=tuple(lease_ids), **self._origin))

    def request_again(self, request: Request, chunk: Chunk) -> None:
        """Asks for the embeddings of a chunk that was read before its request was preempted."""
        key = ChunkKey(
            request.request_id, request.attempt, chunk.item, chunk.index, self._origin["sender"].rank
        )
        self._vits[chunk.wire.vit].send(LeaseRequest(key=key, mm_hash=chunk.wire.mm_hash, **self._origin))

    def tell_awaited(self, order: Order | None) -> None:
        """Tells the carrier which of the embeddings that come through it are needed first, if it has another
        word yet."""
        if self._carrier is not None and self._told_awaited != (order,):
            self._told_awaited = (order,)
            self._carrier.send(OldestAwaited(order=order, **self._origin))

    def send_sets(self, held: Iterable[Lease], now: float) -> None:
        """Sends each owner its whole set of leases once a second: those `held` by requests and in-flight
        steps, and those kept here."""
        if now < self._lease_set_due:
            return
        self._lease_set_due = now + LEASE_SET_INTERVAL_S
        early = [message for messages in self._early.values() for _, message in messages]
        waiting = [message for message in early if isinstance(message, EmbeddingReady)] + self._unmapped
        leases = dict.fromkeys([*held, *map(lease_of, waiting)])
        for owner, sink in self._owners.items():
            epoch, last_lease_id = self._last_seen[owner]
            lease_ids = tuple(
                lease.lease_id for lease in leases if (lease.owner, lease.epoch) == (owner, epoch)
            )
            sink.send(LeaseSet(lease_ids=lease_ids, last_lease_id=last_lease_id, **self._origin))
