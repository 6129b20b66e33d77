"""The chunks of all requests: routed to ViTs, announced by hash, and decoded in order if the ViT lacks them.

Knows no prompts and no states of requests; runs in the event loop of preprocess.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from pipeline.config.preprocess import MAX_OPEN_CHUNKS
from pipeline.process.metrics import STAGE_SECONDS, Histogram
from pipeline.process.nodes import NodeMap
from pipeline.process.trace import Tracer
from pipeline.transport.ends import Sink
from pipeline.transport.fair import FairQueue
from pipeline.transport.slots import OrderedSlots, Slot, SlotAllocator
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, Order, Origin, PoolOpened
from pipeline.wire.encoding import CancelEncode, EncodeMessage, EncodeRequest
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.generation import MmChunk, Via
from pipeline.wire.topology import Role, WorkerId
from pipeline.wire.trace_context import Trace
from workers.preprocess.credits import Shares
from workers.preprocess.media import MediaChunk
from workers.preprocess.places import decrease
from workers.preprocess.router import Router
from workers.preprocess.shortages import refusal_of
from workers.preprocess.threads import Work, on_behalf_of

logger = logging.getLogger(__name__)
UNREADABLE = RequestError("the server cannot read the media of this request", field="messages", status=500)
QUEUE_IS_FULL = ErrorInfo(503, "the server is overloaded: a worker does not read its messages")
ORDER_PATIENCE_S = 0.25  # limits the wait of decoded pixels, which hold a slot, for earlier ones


@dataclass(slots=True)
class ChunkState:
    """A chunk from its routing until its pixels are released."""

    key: ChunkKey
    chunk: MediaChunk
    vit: int
    order: Order
    slot: Slot | None = None
    is_wanted: bool = False  # its pixels are needed
    loading: asyncio.Task[None] | None = None  # its media are being fetched; it has no slot yet
    is_waiting: bool = False  # for its turn to be decoded
    is_decoding: bool = False
    is_over: bool = False  # released or cancelled while it was being decoded
    tenant: str = ""
    adapter: str = ""
    trace: Trace = msgspec.UNSET
    is_copied: bool = False  # a carrier holds its pixels: it needs no slot any more


class ChunkFlow:
    """`on_broken` is called for a chunk that cannot be decoded; `epoch_of` gives the last known epoch of a
    worker; `runs_alone` names the quarantined requests."""

    def __init__(
        self, origin: Origin, pool: TensorPool, allocator: SlotAllocator, vits: Sequence[Sink[EncodeMessage]],
        epoch_of: Callable[[WorkerId], int], nodes: NodeMap,
        tasks: asyncio.TaskGroup, max_decoding: int, on_broken: Callable[[ChunkKey, ErrorInfo], None],
        tracer: Tracer, runs_alone: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self._origin, self._pool, self._vits = origin, pool, vits
        self._epoch_of, self._nodes = epoch_of, nodes
        self._tasks, self._on_broken, self._max_decoding = tasks, on_broken, max_decoding
        # Chunks with a slot that are not decoded yet, by tenant and request.
        self._waiting: FairQueue[tuple[str, int], ChunkState] = FairQueue()
        self._tracer, self._runs_alone = tracer, runs_alone
        self.largest = allocator.reserve  # bytes of pixels
        self._num_taken = allocator.num_used  # by no chunk
        self._max_of_tenant = max(1, max_decoding - max_decoding // 4)
        self._decoding: Counter[str] = Counter()  # by tenant
        # by request, attempt and ViT: done when the chunk that was begun last is sent
        self._last_sent: dict[tuple[str, int, int], asyncio.Future[None]] = {}
        self._slots: OrderedSlots[ChunkKey] = OrderedSlots(allocator)
        self.router = Router(len(vits))
        self._chunks: dict[ChunkKey, ChunkState] = {}
        self._num_by_request: Counter[str] = Counter()
        self.shares = Shares(MAX_OPEN_CHUNKS)
        # By ViT: what its queue had no room for. Without it the ViT would wait for pixels that never come.
        self._unsent_cancels: dict[int, list[ChunkKey]] = defaultdict(list)
        self.num_decoded = 0
        self.decode_seconds = Histogram(STAGE_SECONDS)
        self.num_bytes = {pool.info.kind: 0}  # of pixels sent to ViTs, by transport

    def route(
        self,
        key: ChunkKey,
        chunk: MediaChunk,
        order: Order,
        num_tokens: int,
        tenant: str = "",
        trace: Trace = msgspec.UNSET,
        adapter: str = "",
    ) -> MmChunk:
        """Adds a chunk and chooses its ViT; `announce` sends it there. `adapter`: of the tower."""
        choice = self.router.choose(
            chunk.mm_hash, chunk.grid_thw.num_patches, self._nodes.vits_near(key.lead)
        )
        state = ChunkState(key, chunk, choice.vit, order, is_wanted=not choice.is_known)
        state.tenant, state.trace, state.adapter = tenant, trace, adapter
        assert key not in self._chunks, f"{key} is on its way already"
        self._chunks[key] = state
        self._num_by_request[key.request_id] += 1
        self.shares.add(tenant, 1)
        carriers = [
            Via(node, self._epoch_of(WorkerId(Role.CARRIER, node)))
            for node in self._nodes.way(choice.vit, key.lead)
        ]
        epoch = self._epoch_of(WorkerId(Role.VIT, choice.vit))
        return MmChunk(chunk.mm_hash, num_tokens, choice.vit, epoch, tuple(carriers))

    def announce(self, keys: Iterable[ChunkKey]) -> None:
        """Requests chunks from the ViTs by hash, in order; starts to load those that no ViT has been sent.

        Raises PipelineError where a ViT's queue is full, as one's that loads may be: then all are to be
        cancelled."""
        for key in keys:
            state = self._chunks[key]
            self._vits[state.vit].send(self._encode_request(state))
            self._slots.expect(key, state.order, state.tenant)
            if state.is_wanted:
                self._load(state)

    def on_miss(self, key: ChunkKey) -> None:
        """The ViT lacks this chunk: loads and sends its pixels, or sends them again if the ViT has used
        another request's and released these."""
        state = self._chunks.get(key)
        if state is None:
            return
        if not state.is_wanted:
            state.is_wanted = True
            self._load(state)
        elif state.slot is not None and not state.is_waiting and not state.is_decoding:
            self._send_or_break(state, self._encode_request(state))

    def on_copied(self, key: ChunkKey) -> None:
        """A carrier has copied the pixels, and answers for them until the ViT releases them."""
        state = self._chunks.get(key)
        if state is None or state.slot is None or state.is_waiting or state.is_decoding:
            return
        self._slots.allocator.free(state.slot)
        state.slot, state.is_copied = None, True
        self._grant()

    def on_released(self, key: ChunkKey) -> None:
        if (state := self._chunks.get(key)) is not None:
            self._finish(state)

    def cancel(self, keys: Iterable[ChunkKey]) -> None:
        """Cancels chunks. Those whose pixels the ViT may read stay until it releases them."""
        by_vit: dict[int, list[ChunkKey]] = defaultdict(list)
        states = [state for key in keys if (state := self._chunks.get(key)) is not None]
        for state in states:
            # all first, so that no freed slot is granted to another cancelled chunk
            self._slots.forget(state.key)
        for state in states:
            by_vit[state.vit].append(state.key)
            is_with_vit = state.is_copied or (state.slot is not None and not state.is_waiting)
            if not is_with_vit or state.is_decoding:
                self._finish(state)
        for vit, of_vit in by_vit.items():
            self._tell_cancelled(vit, of_vit)

    def _tell_cancelled(self, vit: int, keys: Iterable[ChunkKey]) -> None:
        """At once, or with a later call: see `tick`."""
        unsent = self._unsent_cancels[vit]
        unsent += keys
        with contextlib.suppress(PipelineError):
            self._vits[vit].send(CancelEncode(keys=tuple(unsent), **self._origin))
            unsent.clear()

    def tick(self) -> None:
        for vit, keys in self._unsent_cancels.items():
            if keys:
                self._tell_cancelled(vit, ())

    def on_vit_death(self, vit: int) -> None:
        """Drops the ViT's chunks. The LLM interrupts their requests, which clients resubmit."""
        self.router.forget(vit)
        self._begin_anew(vit)

    def on_carrier_death(self, node: int) -> None:
        """What is on the way to that node's ViTs is lost, and they have forgotten it. The LLM interrupts the
        requests, as at a ViT's death."""
        for vit in self._nodes.vits_on(node) if node != self._nodes.here else ():
            self._begin_anew(vit)

    def _begin_anew(self, vit: int) -> None:
        states = [state for state in self._chunks.values() if state.vit == vit]
        for state in states:
            self._slots.forget(state.key)
        for state in states:
            self._finish(state)
        self._unsent_cancels.pop(vit, None)
        self._announce_to(vit)

    def announce_pool(self) -> None:
        """To all ViTs, before anything else."""
        for vit in range(len(self._vits)):
            self._announce_to(vit)

    def _announce_to(self, vit: int) -> None:
        epoch = self._epoch_of(WorkerId(Role.VIT, vit))
        self._vits[vit].send(PoolOpened(pool=self._pool.info, receiver_epoch=epoch, **self._origin))

    def _encode_request(self, state: ChunkState) -> EncodeRequest:
        pixels = None
        if state.slot is not None:
            pixels = self._pool.lend(state.slot, state.chunk.shape, "uint8")
        return EncodeRequest(
            key=state.key, arrival=state.order.arrival, position=state.order.position,
            mm_hash=state.chunk.mm_hash,
            grid_thw=state.chunk.grid_thw, pixels=pixels, will_follow=state.is_wanted and pixels is None,
            tenant=state.tenant, adapter=state.adapter, trace=state.trace, **self._origin,
        )  # fmt: skip

    def _load(self, state: ChunkState) -> None:
        """Fetches media before it takes a slot and a decoder: a slow host must not delay other requests."""
        state.loading = self._tasks.create_task(self._load_and_request(state))

    async def _load_and_request(self, state: ChunkState) -> None:
        error = await self._error_of(state, state.chunk.source.load(state.chunk.frames))
        state.loading = None
        if error is not None:
            self._break(state, error)
            return
        self._slots.request(state.key, state.chunk.pixel_bytes)
        self._grant()

    async def _error_of(self, state: ChunkState, work: Coroutine[Any, Any, None]) -> ErrorInfo | None:
        """Awaits a piece of the request's work on its media. Returns the client's error if that fails."""
        request_id = state.key.request_id
        on_behalf_of.set(Work(request_id, self._runs_alone(request_id), state.tenant))
        try:
            await work
        except RequestError as error:
            return error.info
        except Exception as failure:  # of this request only: preprocess goes on
            logger.exception("the media of %s cannot be read", state.key)
            return refusal_of(failure, UNREADABLE).info
        return None

    def _grant(self) -> None:
        """Starts to decode up to `max_decoding` chunks at once: tenants in turn, within a tenant its
        requests. No tenant gets all of these places."""
        for key, slot in self._slots.grant():
            state = self._chunks[key]
            state.slot, state.is_waiting = slot, True
            self._waiting.push(state.tenant, key[:2], state.chunk.pixel_bytes, state.order, state)
        while self._decoding.total() < self._max_decoding:
            held_up = [tenant for tenant, count in self._decoding.items() if count >= self._max_of_tenant]
            waiting = self._waiting.peek(held_up)
            if waiting is None:
                break
            if not waiting.is_waiting:  # cancelled
                self._waiting.drop(held_up)
                continue
            self._waiting.pop(held_up)
            waiting.is_waiting, waiting.is_decoding = False, True
            self._decoding[waiting.tenant] += 1
            self._tasks.create_task(self._decode_in_order(waiting))

    async def _decode_in_order(self, state: ChunkState) -> None:
        """Sends a request's pixels to a ViT in the order in which the LLM needs the embeddings."""
        place = (*state.key[:2], state.vit)
        before, sent = self._last_sent.get(place), asyncio.get_running_loop().create_future()
        self._last_sent[place] = sent

        def finish(_: object) -> None:
            sent.set_result(None)
            if self._last_sent[place] is sent:
                del self._last_sent[place]

        await self._decode(state, before)
        if before is None or before.done():
            finish(None)
        else:
            before.add_done_callback(finish)  # later chunks wait for this one and for all before it

    async def _decode(self, state: ChunkState, before: asyncio.Future[None] | None) -> None:
        start = time.monotonic()
        request = self._encode_request(state)
        assert request.pixels is not None
        source, out = state.chunk.source, self._pool.array(request.pixels)
        error = await self._error_of(state, source.decode(state.chunk.frames, out, request.pixels.offset))
        self.decode_seconds.observe(time.monotonic() - start)
        decrease(self._decoding, state.tenant, 1)
        self._tracer.span("decode picture", start, [state.key.request_id], state.chunk.grid_thw.num_patches)
        self.num_decoded += 1
        if before is not None and error is None and not state.is_over:
            self._grant()
            await asyncio.wait([before], timeout=ORDER_PATIENCE_S)
        state.is_decoding = False
        if state.is_over:
            self._drop(state)
        elif error is None:
            self._send_or_break(state, request)
            self._grant()
        else:
            self._break(state, error)

    def _send_or_break(self, state: ChunkState, request: EncodeRequest) -> None:
        assert request.pixels is not None
        try:
            self._vits[state.vit].send(msgspec.structs.replace(request, sent_at=time.monotonic()))
            self.num_bytes[self._pool.info.kind] += request.pixels.nbytes
        except PipelineError as error:
            logger.warning("%s cannot be passed on: %s", state.key, error)
            self._break(state, QUEUE_IS_FULL)

    def _break(self, state: ChunkState, error: ErrorInfo) -> None:
        """The chunk cannot be fetched, decoded or sent."""
        self._tell_cancelled(state.vit, (state.key,))
        self._drop(state)
        self._on_broken(state.key, error)

    def _finish(self, state: ChunkState) -> None:
        """The chunk's pixels are not needed (any more). Its slot stays until the decoder has ended."""
        if state.is_decoding:
            state.is_over = True
        else:
            self._drop(state)

    def _drop(self, state: ChunkState) -> None:
        """Removes a chunk, and grants its slot to the next."""
        if state.loading is not None:
            state.loading.cancel()
        state.is_waiting = False
        del self._chunks[state.key]
        decrease(self._num_by_request, state.key.request_id, 1)
        self.shares.remove(state.tenant, 1)
        self.router.finished(state.vit, state.chunk.grid_thw.num_patches)
        self._slots.forget(state.key)
        if state.slot is not None:
            self._slots.allocator.free(state.slot)
        self._grant()

    def has_chunks_of(self, request_id: str) -> bool:
        """Whether any attempt of the request has chunks here: being decoded, or with a ViT."""
        return request_id in self._num_by_request

    def check_integrity(self) -> None:
        self._slots.allocator.check_integrity()
        if not self._chunks:
            assert self._slots.allocator.num_used == self._num_taken, "pixel slots are held by no chunk"
            assert not any(self.router.outstanding), "patches are outstanding for no chunk"
