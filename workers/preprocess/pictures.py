"""The pictures of all requests on their way through the ViTs: routed, asked for by hash, decoded in order where they are missed.

Knows nothing of prompts and requests' lives; runs in the event loop of preprocess, decoding on its threads.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from pipeline.errors import ErrorInfo, RequestError
from pipeline.messages import CancelEncode, ChunkKey, EncodeMessage, EncodeRequest, GridTHW, MmChunk, Origin
from pipeline.slots import Order, OrderedSlots, Slot, SlotAllocator
from pipeline.sockets import Sink
from pipeline.tensors import TensorPool
from workers.preprocess.images import ImageSize, decode
from workers.preprocess.router import Router


@dataclass(slots=True)
class Picture:
    """One picture of a request, its bytes still encoded."""

    data: bytes | memoryview
    field: str  # where it stands in the request, for errors
    target: ImageSize
    grid_thw: GridTHW
    mm_hash: bytes


@dataclass(slots=True)
class PictureState:
    """A picture on its way through a ViT."""

    key: ChunkKey
    picture: Picture
    vit: int
    order: Order
    slot: Slot | None = None
    is_wanted: bool = False  # its pixels are asked for
    is_decoding: bool = False
    is_over: bool = False  # released or cancelled while it was being decoded

    @property
    def pixel_bytes(self) -> int:
        return self.picture.target.height * self.picture.target.width * 3


class PictureFlow:
    """`on_broken` is told of a picture that cannot be decoded; `vit_epoch` says which incarnation of a ViT is known."""

    def __init__(
        self, origin: Origin, pool: TensorPool, allocator: SlotAllocator, vits: Sequence[Sink[EncodeMessage]], vit_epoch: Callable[[int], int],
        threads: Executor, tasks: asyncio.TaskGroup, on_broken: Callable[[ChunkKey, ErrorInfo], None],
    ) -> None:  # fmt: skip
        self._origin, self._pool, self._vits, self._vit_epoch = origin, pool, vits, vit_epoch
        self._threads, self._tasks, self._on_broken = threads, tasks, on_broken
        self._slots: OrderedSlots[ChunkKey] = OrderedSlots(allocator)
        self._router = Router(len(vits))
        self._pictures: dict[ChunkKey, PictureState] = {}
        self.num_decoded = 0

    def route(self, key: ChunkKey, picture: Picture, order: Order, num_tokens: int) -> MmChunk:
        """Takes a picture in and chooses its ViT; `announce` tells that ViT."""
        choice = self._router.choose(picture.mm_hash, picture.grid_thw.num_patches)
        self._pictures[key] = PictureState(key, picture, choice.vit, order, is_wanted=not choice.is_known)
        return MmChunk(picture.mm_hash, num_tokens, choice.vit, self._vit_epoch(choice.vit))

    def announce(self, keys: Iterable[ChunkKey]) -> None:
        """Asks the ViTs for pictures by hash, in their order; starts to decode those that no ViT can have."""
        for key in keys:
            state = self._pictures[key]
            self._vits[state.vit].send(self._encode_request(state))
            self._slots.expect(key, state.order)
            if state.is_wanted:
                self._slots.request(key, state.pixel_bytes)
        self._grant()

    def on_miss(self, key: ChunkKey) -> None:
        """The ViT does not have this picture: sends its pixels, again if they came when others' were there and are gone now."""
        state = self._pictures.get(key)
        if state is None:
            return
        if not state.is_wanted:
            state.is_wanted = True
            self._slots.request(key, state.pixel_bytes)
            self._grant()
        elif state.slot is not None and not state.is_decoding:
            self._vits[state.vit].send(self._encode_request(state))

    def on_released(self, key: ChunkKey) -> None:
        if (state := self._pictures.get(key)) is not None:
            self._finish(state)

    def cancel(self, keys: Iterable[ChunkKey]) -> None:
        """Nobody wants these. One whose pixels are with the ViT waits for their release."""
        by_vit: dict[int, list[ChunkKey]] = defaultdict(list)
        states = [state for key in keys if (state := self._pictures.get(key)) is not None]
        for state in states:
            self._slots.forget(state.key)  # all first, so that no freed slot goes to one that is cancelled too
        for state in states:
            by_vit[state.vit].append(state.key)
            if state.slot is None or state.is_decoding:
                self._finish(state)
        for vit, of_vit in by_vit.items():
            self._vits[vit].send(CancelEncode(keys=tuple(of_vit), **self._origin))

    def _encode_request(self, state: PictureState) -> EncodeRequest:
        handle = None
        if state.slot is not None:
            target = state.picture.target
            handle = self._pool.lend(state.slot, (1, target.height, target.width, 3), "uint8")
        return EncodeRequest(
            key=state.key, arrival=state.order.arrival, position=state.order.position, mm_hash=state.picture.mm_hash,
            grid_thw=state.picture.grid_thw, pixels=handle, **self._origin,
        )  # fmt: skip

    def _grant(self) -> None:
        """Starts decoding the pictures that get a slot now."""
        for key, slot in self._slots.grant():
            state = self._pictures[key]
            state.slot, state.is_decoding = slot, True
            self._tasks.create_task(self._decode(state))

    async def _decode(self, state: PictureState) -> None:
        error: RequestError | None = None
        request = self._encode_request(state)
        assert request.pixels is not None
        pixels, picture = self._pool.array(request.pixels), state.picture
        loop = asyncio.get_running_loop()
        try:
            pixels[0] = await loop.run_in_executor(self._threads, decode, picture.data, picture.target, picture.field)
        except RequestError as broken:
            error = broken
        state.is_decoding = False
        self.num_decoded += 1
        if state.is_over:
            self._drop(state)
        elif error is None:
            self._vits[state.vit].send(request)
        else:
            self._vits[state.vit].send(CancelEncode(keys=(state.key,), **self._origin))
            self._drop(state)
            self._on_broken(state.key, error.info)

    def _finish(self, state: PictureState) -> None:
        """No pixels are needed (any more). While a thread still writes them the slot stays."""
        if state.is_decoding:
            state.is_over = True
        else:
            self._drop(state)

    def _drop(self, state: PictureState) -> None:
        """Forgets a picture and gives its slot to the next."""
        del self._pictures[state.key]
        self._router.finished(state.vit, state.picture.grid_thw.num_patches)
        self._slots.forget(state.key)
        if state.slot is not None:
            self._slots.allocator.free(state.slot)
        self._grant()

    def check_integrity(self) -> None:
        self._slots.allocator.check_integrity()
        if not self._pictures:
            assert not self._slots.allocator.num_used, "pixel slots are held for nobody"
            assert not any(self._router.outstanding), "patches are outstanding for nobody"
