"""Pixels on the way from preprocess to the ViTs of this node. Pure but for the memory.

A chunk is announced by hash, which passes at once. Its pixels are copied into a slot of this carrier, and
preprocess gives its own slot to another chunk then; the ViT reads the copy, and releases it as it releases
pixels of preprocess. Slots are granted in the global order, with a reserve for the oldest chunk.
"""

from __future__ import annotations

import enum
import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import msgspec

from pipeline.process.nodes import HEAD
from pipeline.transport.ends import Sink
from pipeline.transport.slots import OrderedSlots, Slot, SlotAllocator
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, Order, Origin, PoolOpened
from pipeline.wire.encoding import (
    CancelEncode,
    EncodeMessage,
    EncodeMiss,
    EncodeRequest,
    FeedbackMessage,
    PixelsCopied,
    PixelsReleased,
)
from workers.carrier.reads import Read, Reads


class Stage(enum.Enum):
    ANNOUNCED = "announced"  # by hash
    WAITING = "waiting"  # for a slot
    READING = "reading"
    PASSED_ON = "passed on"  # the ViT may read the copy


@dataclass(slots=True, eq=False)
class CarriedChunk:
    key: ChunkKey
    vit: int
    stage: Stage = Stage.ANNOUNCED
    request: EncodeRequest | None = None  # with pixels: preprocess's, then this carrier's
    slot: Slot | None = None


class PixelCopies:
    """`vits`: the sinks to this node's ViTs, by index."""

    def __init__(
        self, origin: Origin, pool: TensorPool, allocator: SlotAllocator,
        vits: Mapping[int, Sink[EncodeMessage]], feedback: Sink[FeedbackMessage], reads: Reads,
    ) -> None:  # fmt: skip
        self._origin, self.pool, self.allocator = origin, pool, allocator
        self._vits, self._feedback, self._reads = vits, feedback, reads
        self._chunks: dict[ChunkKey, CarriedChunk] = {}
        self._slots: OrderedSlots[ChunkKey] = OrderedSlots(allocator)
        self._num_abandoned = 0  # slots whose read goes on for nobody

    def announce_to(self, vit: int) -> None:
        self._vits[vit].send(PoolOpened(pool=self.pool.info, **self._origin))

    # From preprocess.

    def on_request(self, vit: int, message: EncodeRequest) -> None:
        chunk = self._chunks.get(message.key)
        if message.pixels is None:
            if chunk is None:
                self._chunks[message.key] = CarriedChunk(message.key, vit)
                self._slots.expect(message.key, Order(message.arrival, message.position), message.tenant)
            self._vits[vit].send(msgspec.structs.replace(message, **self._origin))
        elif chunk is None:  # it was answered from the cache or cancelled meanwhile
            self._feedback.send(PixelsReleased(key=message.key, **self._origin))
        elif chunk.stage is Stage.ANNOUNCED:
            chunk.request, chunk.stage = message, Stage.WAITING
            self._slots.request(message.key, message.pixels.nbytes)
            self._grant()

    def on_cancel(self, vit: int, message: CancelEncode) -> None:
        """The ViT releases what it knows of. A request with pixels that is not passed on yet never will
        be."""
        for key in message.keys:
            chunk = self._chunks.get(key)
            if chunk is not None and chunk.stage is not Stage.PASSED_ON:
                self._drop(chunk)
        self._vits[vit].send(msgspec.structs.replace(message, **self._origin))
        self._grant()

    # The copies.

    def _grant(self) -> None:
        for key, slot in self._slots.grant():
            chunk = self._chunks[key]
            assert chunk.request is not None
            assert chunk.request.pixels is not None
            source = chunk.request.pixels
            chunk.slot, chunk.stage = slot, Stage.READING
            target = self.pool.lend(slot, source.shape, source.dtype)
            request = msgspec.structs.replace(
                chunk.request, pixels=target, sent_at=0.0, **self._origin
            )  # fmt: skip
            on_end = functools.partial(self._on_end, chunk, request, slot)
            self._reads.begin(Read(HEAD, source, self.pool, target, on_end))

    def _on_end(self, chunk: CarriedChunk, request: EncodeRequest, slot: Slot, is_there: bool) -> None:
        if self._chunks.get(chunk.key) is not chunk:  # dropped while it was read
            self._num_abandoned -= 1
            self.allocator.free(slot)
        elif is_there:
            chunk.request, chunk.stage = request, Stage.PASSED_ON
            self._feedback.send(PixelsCopied(key=chunk.key, **self._origin))
            self._vits[chunk.vit].send(request)
        else:  # preprocess sends them again, unless it has forgotten the chunk
            assert chunk.request is not None
            order, tenant = Order(request.arrival, request.position), request.tenant
            self.allocator.free(slot)
            chunk.request, chunk.slot, chunk.stage = None, None, Stage.ANNOUNCED
            self._slots.expect(chunk.key, order, tenant)
            self._feedback.send(EncodeMiss(key=chunk.key, **self._origin))
        self._grant()

    def _drop(self, chunk: CarriedChunk) -> None:
        del self._chunks[chunk.key]
        self._slots.forget(chunk.key)
        if chunk.stage is Stage.READING:
            self._num_abandoned += 1  # the slot is free when nothing is written to it any more
        elif chunk.slot is not None:
            self.allocator.free(chunk.slot)

    # From the ViTs.

    def on_feedback(self, message: PixelsReleased | EncodeMiss) -> None:
        chunk = self._chunks.get(message.key)
        match message:
            case PixelsReleased():
                if chunk is not None:
                    self._drop(chunk)
                    self._grant()
            case EncodeMiss():
                if chunk is not None and chunk.request is not None:
                    if chunk.stage is Stage.PASSED_ON:
                        self._vits[chunk.vit].send(chunk.request)
                    return  # else they are on the way
            case _:
                assert_never(message)
        self._feedback.send(msgspec.structs.replace(message, **self._origin))

    # Deaths.

    def on_vit_death(self, vit: int) -> None:
        """It reads nothing any more. Preprocess drops its chunks, too."""
        for chunk in [chunk for chunk in self._chunks.values() if chunk.vit == vit]:
            self._drop(chunk)
        self._grant()
        self.announce_to(vit)

    def on_preprocess_death(self) -> None:
        """Cancels all. What a ViT may be reading stays until it says that it is done."""
        keys: dict[int, list[ChunkKey]] = defaultdict(list)
        for chunk in list(self._chunks.values()):
            keys[chunk.vit].append(chunk.key)
            if chunk.stage is not Stage.PASSED_ON:
                self._drop(chunk)
        for vit, of_vit in keys.items():
            self._vits[vit].send(CancelEncode(keys=tuple(of_vit), **self._origin))

    @property
    def num_chunks(self) -> int:
        return len(self._chunks)

    def check_integrity(self) -> None:
        self.allocator.check_integrity()
        num_held = sum(chunk.slot is not None for chunk in self._chunks.values())
        assert self.allocator.num_used == num_held + self._num_abandoned, "slots are held by no chunk"
