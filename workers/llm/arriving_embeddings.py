"""Handles messages from ViTs to rank 0: embeddings, failures, and refusals of a second lease.

They come over other connections than the requests, so an embedding may arrive before its request.
"""

from __future__ import annotations

from pipeline.wire.generation import EmbeddingReady, EncodeFailed, LeaseRefused
from workers.llm.chunk import Chunk
from workers.llm.clients import Clients, Interruption
from workers.llm.leases import Leases, lease_of
from workers.llm.requests import Requests
from workers.llm.stepping import Pools


class ArrivingEmbeddings:
    def __init__(self, requests: Requests, clients: Clients, leases: Leases, pools: Pools) -> None:
        self._requests, self._clients, self._leases, self._pools = requests, clients, leases, pools

    def on_ready(self, message: EmbeddingReady, now: float) -> None:
        self._leases.saw(message)
        if not self._pools.knows(message.embeddings.pool_id, message.embeddings.epoch):
            self._leases.keep_unmapped(message)
            return
        if self._is_early(message, now):
            return
        chunk, lease = self._wanted_chunk(message), lease_of(message)
        if chunk is None:
            self._leases.release([lease])
            return
        chunk.embeddings, chunk.lease = message.embeddings, lease
        chunk.was_encoded = chunk.was_encoded or message.was_encoded
        self._requests.stats.on_embeddings(message.sent_at)

    def on_failed(self, message: EncodeFailed, now: float) -> None:
        if not self._is_early(message, now) and self._wanted_chunk(message) is not None:
            self._requests.fail(self._requests.open[message.key.request_id], message.error, now)

    def on_refused(self, message: LeaseRefused, now: float) -> None:
        """A preempted request needs a chunk that its ViT has evicted: the next attempt encodes it again."""
        if self._wanted_chunk(message) is not None:
            choices = self._requests.open[message.key.request_id]
            self._requests.interrupt(choices, Interruption("preempted"), now)

    def _is_early(self, message: EmbeddingReady | EncodeFailed, now: float) -> bool:
        """Whether the message's attempt is not here yet; the message is kept then."""
        request_id, attempt = message.key.request_id, message.key.attempt
        known = self._requests.known(request_id)
        if known is not None and known.attempt >= attempt:
            return False
        self._leases.keep_early(message, now)
        return True

    def _wanted_chunk(self, message: EmbeddingReady | EncodeFailed | LeaseRefused) -> Chunk | None:
        """The chunk that lacks these embeddings, which may be a lost chunk that has not requested them yet.

        Where several choices lack them, a choice that waits for them now goes first.
        """
        key = message.key
        choices = self._requests.open.get(key.request_id)
        if choices is None or choices.attempt != key.attempt:
            return None
        chunks = (chunk for request in choices.open for chunk in request.chunks)
        wanted = [
            chunk
            for chunk in chunks
            if (chunk.item, chunk.index) == (key.item, key.chunk)
            and chunk.embeddings is None
            and not chunk.is_read
        ]
        return min(wanted, key=lambda chunk: chunk.is_lost, default=None)
