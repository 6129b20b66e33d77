"""Rank 0's leases on embeddings: those whose request or pool is not here yet, and what the ViTs are told.

Only this rank holds and releases them. When the result of a step is here, every rank has gathered what the step read (the gather
precedes the first all-reduce), so a chunk is released as soon as its tokens are computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from pipeline.messages import ChunkKey, EmbeddingReady, EncodeFailed, EncodeMessage, LeaseReleased, LeaseRequest, LeaseSet, Origin
from pipeline.sockets import Sink
from workers.llm.request import Chunk, Lease, Request

LEASE_SET_INTERVAL_S = 1.0
MEMORY_OF_EARLY_S = 60.0


class Leases:
    """`vits` are the ways to the ViTs, by index."""

    def __init__(self, origin: Origin, vits: Sequence[Sink[EncodeMessage]]) -> None:
        self._origin, self._vits = origin, vits
        self._early: dict[str, list[tuple[float, EmbeddingReady | EncodeFailed]]] = {}  # of requests or attempts not here yet
        self._unmapped: list[EmbeddingReady] = []  # of pools not here yet
        self._last_lease_ids = [0] * len(vits)
        self._lease_set_due = 0.0

    def saw(self, message: EmbeddingReady) -> None:
        vit = message.sender.rank
        self._last_lease_ids[vit] = max(self._last_lease_ids[vit], message.lease_id)

    def keep_unmapped(self, message: EmbeddingReady) -> None:
        self._unmapped.append(message)

    def take_unmapped(self) -> list[EmbeddingReady]:
        unmapped, self._unmapped = self._unmapped, []
        return unmapped

    def keep_early(self, message: EmbeddingReady | EncodeFailed, now: float) -> None:
        """Keeps what a ViT says of an attempt that is not here yet: its connection may be faster than that of preprocess."""
        self._early.setdefault(message.key.request_id, []).append((now, message))

    def take_early(self, request_id: str) -> list[EmbeddingReady | EncodeFailed]:
        return [message for _, message in self._early.pop(request_id, ())]

    def drop_early(self, request_id: str) -> None:
        early = self.take_early(request_id)
        self.release([Lease(message.sender.rank, message.lease_id) for message in early if isinstance(message, EmbeddingReady)])

    def forget_early(self, now: float) -> None:
        """Gives back what came for requests that never did."""
        for request_id, early in list(self._early.items()):
            if now - early[0][0] >= MEMORY_OF_EARLY_S:
                self.drop_early(request_id)

    def release(self, leases: Iterable[Lease]) -> None:
        by_vit: dict[int, list[int]] = defaultdict(list)
        for lease in leases:
            by_vit[lease.vit].append(lease.lease_id)
        for vit, lease_ids in by_vit.items():
            self._vits[vit].send(LeaseReleased(lease_ids=tuple(lease_ids), **self._origin))

    def request_again(self, request: Request, chunk: Chunk) -> None:
        """Asks for the embeddings of a chunk that was read before its request was preempted."""
        key = ChunkKey(request.request_id, request.attempt, chunk.item, chunk.index, self._origin["sender"].rank)
        self._vits[chunk.wire.vit].send(LeaseRequest(key=key, mm_hash=chunk.wire.mm_hash, **self._origin))

    def send_sets(self, held: Iterable[Lease], now: float) -> None:
        """Once a second, all leases: the `held` ones of requests and of steps, and those kept here."""
        if now < self._lease_set_due:
            return
        self._lease_set_due = now + LEASE_SET_INTERVAL_S
        early = [message for messages in self._early.values() for _, message in messages]
        waiting = [message for message in early if isinstance(message, EmbeddingReady)] + self._unmapped
        leases = [*held, *(Lease(message.sender.rank, message.lease_id) for message in waiting)]
        for vit, sink in enumerate(self._vits):
            lease_ids = tuple(lease.lease_id for lease in leases if lease.vit == vit)
            sink.send(LeaseSet(lease_ids=lease_ids, last_lease_id=self._last_lease_ids[vit], **self._origin))
