"""A ViT: its batches are those of the server's `Batcher`, their times are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, assert_never

from pipeline.families import VisionInfo
from pipeline.transport.slots import SlotAllocator, align, pool_size
from pipeline.wire.base import ChunkKey, GridTHW, Order
from pipeline.wire.handles import TensorHandle
from tools.simulation.clock import Busy, Clock, Event
from tools.simulation.stages import StageTimes
from tools.simulation.turns import Turns
from workers.vit.batcher import Action, Batcher, LeaseGone, NeedPixels, Pending, PixelsDone, Ready, Refused

DTYPE = "bfloat16"
MAX_SLOTS = 8192


class Listener(Protocol):
    """Whom a ViT tells: preprocessing of pixels, the groups of embeddings."""

    def on_miss(self, key: ChunkKey) -> None: ...

    def on_released(self, key: ChunkKey) -> None: ...

    def on_ready(self, key: ChunkKey, vit: int, lease_id: int) -> None: ...

    def on_lease_gone(self, key: ChunkKey) -> None: ...


class Vit:
    def __init__(
        self, clock: Clock, index: int, stages: StageTimes, vision: VisionInfo, turns: Turns,
        listener: Listener, busy: Busy, pool_bytes: int, max_batch_patches: int,
    ) -> None:  # fmt: skip
        self._clock, self.index, self._stages, self._turns = clock, index, stages, turns
        self._listener, self._busy, self._max_patches = listener, busy, max_batch_patches
        largest = align(vision.largest_embedding(DTYPE).nbytes)
        allocator = SlotAllocator(pool_size(pool_bytes, largest), largest, MAX_SLOTS)
        self.batcher = Batcher(allocator, lambda grid: vision.embedding(grid, DTYPE))
        self._batch: list[Pending] = []
        self._left_s, self._began = 0.0, 0.0  # of the batch
        self._ending: Event | None = None  # None: paused, or idle
        turns.vits.append(self)

    def request(
        self, key: ChunkKey, order: Order, content: bytes, grid: GridTHW, pixels: TensorHandle | None,
        will_follow: bool,
    ) -> None:  # fmt: skip
        self._act(self.batcher.on_request(key, order, content, grid, pixels, will_follow=will_follow))
        self._start()

    def lease_again(self, key: ChunkKey, content: bytes) -> None:
        self._act(self.batcher.on_lease_request(key, content))

    def release(self, lease_ids: Sequence[int]) -> None:
        self.batcher.cache.release(lease_ids)
        self._act(self.batcher.poll())
        self._start()

    def cancel(self, key: ChunkKey) -> None:
        self._act(self.batcher.on_cancel([key]))
        self._start()

    # Turns.

    @property
    def is_busy(self) -> bool:
        return bool(self._batch or self.batcher.num_pending)

    def pause(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None
            self._left_s -= self._clock.now - self._began
            self._busy.add(self.index, self._began, self._clock.now)

    def go_on(self) -> None:
        if self._batch and self._ending is None:
            self._began = self._clock.now
            self._ending = self._clock.after(max(0.0, self._left_s), self._end)

    def _start(self) -> None:
        if self._batch:
            return
        self._batch = self.batcher.next_batch(self._max_patches)
        self._act(self.batcher.poll())
        if self._batch:
            self._left_s = self._stages.encode_seconds([one.grid_thw.num_patches for one in self._batch])
            if self._turns.is_vits_turn:
                self.go_on()

    def _end(self) -> None:
        self._busy.add(self.index, self._began, self._clock.now)
        batch, self._batch, self._ending = self._batch, [], None
        self._act(self.batcher.on_encoded(batch))
        self._start()
        if not self.is_busy:
            self._turns.on_vit_idle()

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case NeedPixels(key):
                    self._listener.on_miss(key)
                case PixelsDone(key):
                    self._listener.on_released(key)
                case Ready(key, lease_id):
                    self._listener.on_ready(key, self.index, lease_id)
                case LeaseGone(key):
                    self._listener.on_lease_gone(key)
                case Refused(_, reason):
                    raise ValueError(f"a picture of the load is refused: {reason}")
                case _:
                    assert_never(action)
