"""Rank 0's leases on embeddings: those whose request or pool is not here yet, and the messages to the ViTs.

Only rank 0 holds and releases leases. When the result of a step is here, every rank has gathered what the
step read (the gather precedes the first all-reduce), so a chunk is released as soon as its tokens are
computed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from pipeline.transport.ends import Sink
from pipeline.wire.base import ChunkKey, Origin
from pipeline.wire.encoding import EncodeMessage, LeaseReleased, LeaseRequest, LeaseSet
from pipeline.wire.generation import EmbeddingReady, EncodeFailed
from workers.llm.chunk import Chunk, Lease
from workers.llm.request import Request

LEASE_SET_INTERVAL_S = 1.0
MEMORY_OF_EARLY_S = 60.0


def lease_of(message: EmbeddingReady) -> Lease:
    return Lease(message.sender.rank, message.epoch, message.lease_id)


class Leases:
    """`vits` are the sinks to the ViTs, by index."""

    def __init__(self, origin: Origin, vits: Sequence[Sink[EncodeMessage]]) -> None:
        self._origin, self._vits = origin, vits
        # By request id: messages about requests or attempts not here yet, with their arrival times.
        self._early: dict[str, list[tuple[float, EmbeddingReady | EncodeFailed]]] = {}
        self._unmapped: list[EmbeddingReady] = []  # their pools are not here yet
        self._last_seen = [(0, 0)] * len(vits)  # epoch and lease id; a ViT's successor counts from one again
        self._lease_set_due = 0.0
        self._num_more: Counter[Lease] = Counter()  # requests that hold the lease, beyond the first

    def saw(self, message: EmbeddingReady) -> None:
        vit = message.sender.rank
        self._last_seen[vit] = max(self._last_seen[vit], (message.epoch, message.lease_id))

    def forget_vit(self, vit: int, epoch: int) -> None:
        """A ViT has died: its leases are void. `epoch` is its successor's."""

        def is_alive(message: EmbeddingReady | EncodeFailed) -> bool:
            return message.sender.rank != vit or message.epoch >= epoch

        self._last_seen[vit] = max(self._last_seen[vit], (epoch, 0))
        self._unmapped = [message for message in self._unmapped if is_alive(message)]
        for lease in [lease for lease in self._num_more if lease.vit == vit and lease.vit_epoch < epoch]:
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
        by_vit: dict[int, list[int]] = defaultdict(list)
        for lease in leases:
            if num_more := self._num_more.pop(lease, 0):
                self.share(lease, num_more - 1)
                continue
            if lease.vit_epoch >= self._last_seen[lease.vit][0]:  # else the lease ended with its ViT
                by_vit[lease.vit].append(lease.lease_id)
        for vit, lease_ids in by_vit.items():
            self._vits[vit].send(LeaseReleased(lease_ids=tuple(lease_ids), **self._origin))

    def request_again(self, request: Request, chunk: Chunk) -> None:
        """Asks for the embeddings of a chunk that was read before its request was preempted."""
        key = ChunkKey(
            request.request_id, request.attempt, chunk.item, chunk.index, self._origin["sender"].rank
        )
        self._vits[chunk.wire.vit].send(LeaseRequest(key=key, mm_hash=chunk.wire.mm_hash, **self._origin))

    def send_sets(self, held: Iterable[Lease], now: float) -> None:
        """Sends each ViT its whole set of leases once a second: those `held` by requests and in-flight steps,
        and those kept here."""
        if now < self._lease_set_due:
            return
        self._lease_set_due = now + LEASE_SET_INTERVAL_S
        early = [message for messages in self._early.values() for _, message in messages]
        waiting = [message for message in early if isinstance(message, EmbeddingReady)] + self._unmapped
        leases = dict.fromkeys([*held, *map(lease_of, waiting)])
        for vit, sink in enumerate(self._vits):
            epoch, last_lease_id = self._last_seen[vit]
            lease_ids = tuple(
                lease.lease_id for lease in leases if (lease.vit, lease.vit_epoch) == (vit, epoch)
            )
            sink.send(LeaseSet(lease_ids=lease_ids, last_lease_id=last_lease_id, **self._origin))
