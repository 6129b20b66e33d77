"""Preprocessing: requests are prepared one after the other, pictures decoded by several processes, in the
places of a pool. What is decoded next, and for which ViT, the server's own code decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.transport.fair import FairQueue
from pipeline.transport.slots import OrderedSlots, Slot, SlotAllocator, align, pool_size
from pipeline.wire.base import ChunkKey, Order
from pipeline.wire.generation import MmChunk
from pipeline.wire.handles import TensorHandle
from tools.simulation.clock import Busy, Clock
from tools.simulation.load import Picture, Submission
from tools.simulation.stages import StageTimes
from tools.simulation.vit import MAX_SLOTS, Vit
from workers.preprocess.router import Router


@dataclass(slots=True)
class Decoding:
    """A picture on its way to a ViT."""

    key: ChunkKey
    picture: Picture
    vit: int
    order: Order
    is_wanted: bool  # its pixels are needed
    slot: Slot | None = None
    is_waiting: bool = False  # for a process that decodes
    is_decoding: bool = False
    is_over: bool = False  # released or cancelled while it was being decoded


class Preprocess:
    """`on_prepared` is called with each submission, when its prompt is known."""

    def __init__(
        self, clock: Clock, stages: StageTimes, num_readers: int, largest_bytes: int, pool_bytes: int,
        busy: Busy, on_prepared: Callable[[Submission], None],
    ) -> None:  # fmt: skip
        self._clock, self._stages, self._on_prepared = clock, stages, on_prepared
        self.vits: Sequence[Vit] = ()
        self.router = Router(0)
        self._is_preparing, self._queue = False, list[Submission]()
        largest = align(largest_bytes)
        allocator = SlotAllocator(pool_size(pool_bytes, largest), largest, MAX_SLOTS)
        self._slots: OrderedSlots[ChunkKey] = OrderedSlots(allocator)
        self._waiting: FairQueue[tuple[str, int], Decoding] = FairQueue()
        self._free = list(range(num_readers - 1, -1, -1))  # processes that decode
        self._open: dict[ChunkKey, Decoding] = {}
        self._busy = busy

    def connect(self, vits: Sequence[Vit]) -> None:
        self.vits, self.router = vits, Router(len(vits))

    # Requests.

    def submit(self, submission: Submission) -> None:
        self._queue.append(submission)
        self._prepare()

    def _prepare(self) -> None:
        if self._is_preparing or not self._queue:
            return
        submission = self._queue.pop(0)
        self._is_preparing = True
        stages, megapixels = self._stages, sum(picture.megapixels for picture in submission.pictures)
        seconds = stages.prepare_s + stages.prepare_token_s * submission.num_prompt_tokens
        seconds += stages.prepare_megapixel_s * megapixels

        def done() -> None:
            self._is_preparing = False
            self._on_prepared(submission)
            self._prepare()

        self._clock.after(seconds, done)

    # Pictures.

    def route(self, key: ChunkKey, picture: Picture, order: Order) -> MmChunk:
        choice = self.router.choose(picture.content, picture.grid.num_patches)
        self._open[key] = Decoding(key, picture, choice.vit, order, is_wanted=not choice.is_known)
        return MmChunk(picture.content, picture.num_tokens, choice.vit, 1)

    def announce(self, keys: Sequence[ChunkKey]) -> None:
        for key in keys:
            one = self._open[key]
            self._slots.expect(key, one.order)
            if one.is_wanted:
                self._slots.request(key, one.picture.pixel_bytes)
            self._tell(one, None)
        self._grant()

    def _tell(self, one: Decoding, pixels: TensorHandle | None) -> None:
        will_follow = one.is_wanted and pixels is None
        vit, picture = self.vits[one.vit], one.picture
        vit.request(one.key, one.order, picture.content, picture.grid, pixels, will_follow)

    def on_miss(self, key: ChunkKey) -> None:
        """The ViT lacks a picture that it had once, or wants its pixels again."""
        one = self._open.get(key)
        if one is None:
            return
        if not one.is_wanted:
            one.is_wanted = True
            self._slots.request(key, one.picture.pixel_bytes)
            self._grant()
        elif one.slot is not None and not one.is_waiting and not one.is_decoding:
            self._tell(one, _pixels(one))

    def on_released(self, key: ChunkKey) -> None:
        if (one := self._open.get(key)) is not None:
            self._finish(one)

    def cancel(self, key: ChunkKey) -> None:
        one = self._open.get(key)
        if one is None:
            return
        self._slots.forget(key)
        if one.slot is None or one.is_waiting or one.is_decoding:
            self._finish(one)
        self.vits[one.vit].cancel(key)

    def _finish(self, one: Decoding) -> None:
        if one.is_decoding:
            one.is_over = True
        else:
            self._drop(one)

    def _drop(self, one: Decoding) -> None:
        one.is_waiting = False
        del self._open[one.key]
        self.router.finished(one.vit, one.picture.grid.num_patches)
        self._slots.forget(one.key)
        if one.slot is not None:
            self._slots.allocator.free(one.slot)
        self._grant()

    def _grant(self) -> None:
        for key, slot in self._slots.grant():
            one = self._open[key]
            one.slot, one.is_waiting = slot, True
            self._waiting.push("", key[:2], one.picture.pixel_bytes, one.order, one)
        while self._free and (waiting := self._waiting.peek()) is not None:
            if not waiting.is_waiting:  # cancelled
                self._waiting.drop()
                continue
            self._waiting.pop()
            waiting.is_waiting, waiting.is_decoding = False, True
            self._decode(waiting, self._free.pop())

    def _decode(self, one: Decoding, reader: int) -> None:
        start, stages = self._clock.now, self._stages

        def done() -> None:
            self._busy.add(reader, start, self._clock.now)
            self._free.append(reader)
            one.is_decoding = False
            if one.is_over:
                self._drop(one)
            else:
                self._tell(one, _pixels(one))
            self._grant()

        seconds = stages.decode_picture_s + stages.decode_megapixel_s * one.picture.megapixels
        self._clock.after(seconds, done)

    @property
    def num_open(self) -> int:
        return len(self._open) + len(self._queue)


def _pixels(one: Decoding) -> TensorHandle:
    assert one.slot is not None
    return TensorHandle(
        "preprocess.0", 1, one.slot.number, one.slot.generation, one.slot.offset, (1,), "uint8"
    )
