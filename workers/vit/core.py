"""The ViT without its process: handles messages, and sends what the batcher decides."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import assert_never

from pipeline.families import VisionInfo
from pipeline.process.nodes import HEAD
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Sink
from pipeline.transport.tensors import PoolGoneError, PoolMap, StaleHandleError, TensorPool
from pipeline.wire.base import Order, PoolOpened
from pipeline.wire.carrying import CarryMessage
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import (
    CancelEncode,
    EncodeMessage,
    EncodeMiss,
    EncodeRequest,
    LeaseReleased,
    LeaseRequest,
    LeaseSet,
    PixelsReleased,
)
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.generation import EmbeddingReady, EncodeFailed, LeaseRefused, LlmMessage
from pipeline.wire.topology import Role, WorkerId
from workers.nn.weights.adapters import NO_ADAPTER
from workers.vit.batcher import Action, Batcher, LeaseGone, NeedPixels, Pending, PixelsDone, Ready, Refused
from workers.vit.models.base import EncodeJob


class VitCore:
    """`llms`: a sender to rank 0 of each LLM group, by that rank's number in the pipeline. `adapters`: names,
    in the order of the engine's numbers. `carrier`: to the carrier of this node, if there are several nodes.
    `feedback`: to preprocess, or to that carrier.
    """

    def __init__(
        self, context: WorkerContext, batcher: Batcher, pool: TensorPool, info: VisionInfo,
        llms: Mapping[int, Sink[LlmMessage]], feedback: Sink[PixelsReleased | EncodeMiss], pools: PoolMap,
        adapters: Sequence[str] = (), carrier: Sink[CarryMessage] | None = None,
    ) -> None:  # fmt: skip
        self._origin, self._carrier, self._nodes = context.origin, carrier, context.nodes
        self._epoch_of = context.epoch_of
        self._is_current, self._follow = context.is_current, context.tracer.follow
        self.batcher, self._pool, self._info = batcher, pool, info
        self._llms, self._feedback = llms, feedback
        self._pools, self._adapters = pools, adapters
        self.num_encodes = self.num_stale = 0
        self.num_bytes = {pool.info.kind: 0}  # handed to the LLM, by transport

    def handle(self, message: EncodeMessage) -> None:
        if not self._is_current(message):
            self.num_stale += 1
            return
        match message:
            case PoolOpened():
                with contextlib.suppress(PoolGoneError):  # its successor will announce another
                    self._pools.open(message.pool)
            case EncodeRequest():
                self._follow(message.key.request_id, message.key.attempt, message.trace)
                order = Order(message.arrival, message.position)
                actions = self.batcher.on_request(
                    message.key,
                    order,
                    message.mm_hash,
                    message.grid_thw,
                    message.pixels,
                    message.tenant,
                    message.will_follow,
                    message.sent_at,
                    message.adapter,
                )
                self._act(actions)
            case CancelEncode():
                self._act(self.batcher.on_cancel(message.keys))
            case LeaseRequest():
                self._act(self.batcher.on_lease_request(message.key, message.mm_hash))
            case LeaseReleased():
                self.batcher.cache.release(message.lease_ids)
                self._act(self.batcher.poll())
            case LeaseSet():
                self.batcher.cache.reconcile(message.sender, message.lease_ids, message.last_lease_id)
                self._act(self.batcher.poll())
            case _:
                assert_never(message)

    def announce(self) -> None:
        """Sends the pool to all who read it."""
        for lead in self._llms:
            self._announce_to(lead)
        self._announce_to_carrier()

    def _announce_to(self, lead: int) -> None:
        epoch = self._epoch_of(WorkerId(Role.LLM, lead))
        self._llms[lead].send(PoolOpened(pool=self._pool.info, receiver_epoch=epoch, **self._origin))

    def _announce_to_carrier(self) -> None:
        if self._carrier is not None:
            self._carrier.send(PoolOpened(pool=self._pool.info, **self._origin))

    def on_death(self, successor: WorkerState) -> None:
        """Of preprocess, an LLM group or a carrier. No batch may be running: it could read the dead worker's
        memory."""
        worker = successor.worker
        match worker.role:
            case Role.PREPROCESS:
                self._forget_pixels(successor)
            case Role.CARRIER:
                self._on_carrier_death(successor)
            case Role.LLM if worker.rank in self._llms:
                self._act(self.batcher.forget_group(worker.rank))
                self._announce_to(worker.rank)

    def _forget_pixels(self, successor: WorkerState) -> None:
        """Who sent the pixels has died."""
        self._act(self.batcher.forget_all())
        # unless the successor's pool has replaced it already
        if not self._pools.knows(str(successor.worker), successor.epoch):
            self._pools.close(str(successor.worker))

    def _on_carrier_death(self, successor: WorkerState) -> None:
        if successor.worker == self._nodes.carrier:
            if self._nodes.here != HEAD:  # the carrier brings the pixels
                self._forget_pixels(successor)
            self._announce_to_carrier()
            return
        self.batcher.cache.release_all(successor.worker)
        self._act(self.batcher.poll())
        for lead in self._llms:
            if self._nodes.carrier_to(lead) == successor.worker:
                self._announce_to(lead)

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case NeedPixels(key):
                    self._feedback.send(EncodeMiss(key=key, **self._origin))
                case PixelsDone(key):
                    self._feedback.send(PixelsReleased(key=key, **self._origin))
                case Ready(key, lease_id, feature, was_encoded, order):
                    handle = self._pool.lend(feature.slot, feature.value.shape, feature.value.dtype)
                    self.num_bytes[self._pool.info.kind] += handle.nbytes
                    ready = EmbeddingReady(
                        key=key, lease_id=lease_id, embeddings=handle, was_encoded=was_encoded,
                        sent_at=time.monotonic(), order=order, **self._origin,
                    )  # fmt: skip
                    self._llms[key.lead].send(ready)
                case LeaseGone(key):
                    self._llms[key.lead].send(LeaseRefused(key=key, **self._origin))
                case Refused(key, reason):
                    self._llms[key.lead].send(
                        EncodeFailed(key=key, error=ErrorInfo(400, reason, "messages"), **self._origin)
                    )
                case _:
                    assert_never(action)

    def next_batch(self, max_patches: int) -> tuple[list[Pending], list[EncodeJob]]:
        """The chunks to encode now, and their tensors. Refuses chunks with stale or misshapen pixels."""
        batch: list[Pending] = []
        jobs: list[EncodeJob] = []
        while not batch and (candidates := self.batcher.next_batch(max_patches)):
            for pending in candidates:
                try:
                    jobs.append(self._job(pending))
                    batch.append(pending)
                except StaleHandleError as error:
                    self._act(self.batcher.on_failed(pending, f"the pixels cannot be read: {error}"))
        self._act(self.batcher.poll())  # a grant may have evicted a parked chunk
        return batch, jobs

    def _job(self, pending: Pending) -> EncodeJob:
        """Raises StaleHandleError for pixels that are gone, or whose shape does not fit the grid."""
        assert pending.pixels is not None
        assert pending.slot is not None
        grid, patch = pending.grid_thw, self._info.patch_size
        pixels = self._pools.tensor(pending.pixels)
        if (
            pixels.shape[1:] != (grid.h * patch, grid.w * patch, 3)
            or len(pixels) > grid.t * self._info.temporal_patch_size
        ):
            raise StaleHandleError(f"their shape {tuple(pixels.shape)} does not fit the grid {tuple(grid)}")
        embedding = self.batcher.embedding_of(grid)
        handle = self._pool.lend(pending.slot, embedding.shape, embedding.dtype)
        adapter = self._adapters.index(pending.adapter) if pending.adapter else NO_ADAPTER
        return EncodeJob(pixels, grid, self._pool.tensor(handle), adapter)

    def on_encoded(self, batch: Sequence[Pending]) -> None:
        self.num_encodes += len(batch)
        self._act(self.batcher.on_encoded(batch))
