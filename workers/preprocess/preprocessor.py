"""Preprocess without its process: renders prompts, fetches, decodes and resizes pictures, and routes them to the ViTs.

A request's way: media are fetched → sizes and hashes are read → `GenerateRequest` goes to the LLM → each picture is asked for by
hash at its ViT → those that no ViT has are decoded, in order, into the pixel pool and sent. Everything that waits for one
request waits in that request's own task; decoding runs on threads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar, assert_never

import msgspec

from pipeline.config import MIB, PreprocessConfig
from pipeline.errors import ErrorInfo, RequestError
from pipeline.families import ModelInfo
from pipeline.messages import (
    AbortRequest,
    CancelEncode,
    ChunkKey,
    EncodeMessage,
    EncodeMiss,
    EncodeRequest,
    FeedbackMessage,
    GenerateRequest,
    GridTHW,
    Hello,
    ImagePart,
    IngestMessage,
    ItemNotNeeded,
    LlmMessage,
    MmChunk,
    MmItem,
    PixelsReleased,
    RequestEnded,
    SubmitRequest,
    pack_int32,
    unpack_int32,
)
from pipeline.process import WorkerContext
from pipeline.slots import Order, OrderedSlots, Slot, SlotAllocator
from pipeline.sockets import Sink
from pipeline.tensors import TensorPool
from pipeline.topology import Role, WorkerId
from workers.preprocess.fetch import Fetcher, decode_base64
from workers.preprocess.images import ImageSize, content_hash, decode, grid_of, read_size, smart_resize
from workers.preprocess.prompt import ChatPrompt, Prompt
from workers.preprocess.router import Router

logger = logging.getLogger(__name__)
R = TypeVar("R")
MEMORY_OF_ENDED_S = 60.0
MAX_MESSAGES = 1024


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


@dataclass(slots=True)
class OpenRequest:
    client_id: bytes
    request_id: str
    attempt: int
    task: asyncio.Task[None] | None = None
    reply: GenerateRequest | AbortRequest | None = None  # what the LLM was told, for queries
    keys: list[ChunkKey] = field(default_factory=list)
    num_media_bytes: int = 0
    ended_at: float | None = None


class Preprocessor:
    """Preprocess without its process. Everything runs in one event loop but decoding."""

    def __init__(
        self, context: WorkerContext, config: PreprocessConfig, info: ModelInfo, pool: TensorPool, allocator: SlotAllocator,
        llm: Sink[LlmMessage], vits: Sequence[Sink[EncodeMessage]], tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        self._origin = context.origin
        self._context, self._config, self._info = context, config, info
        self._llm, self._vits, self._tasks = llm, vits, tasks
        self._pool = pool
        self._slots: OrderedSlots[ChunkKey] = OrderedSlots(allocator)
        self._threads = ThreadPoolExecutor(max(2, context.spec.placement.num_threads), "decode")
        self._fetcher = Fetcher(config)
        self._prompt = ChatPrompt(info.folder, info.image_token_id, info.text.max_position_embeddings)
        self._router = Router(len(vits))
        self._settings = f"{info.folder}|{info.vision.min_pixels}|{info.vision.max_pixels}".encode()
        self._requests: dict[str, OpenRequest] = {}
        self._pictures: dict[ChunkKey, PictureState] = {}
        self._last_arrival = 0
        self.is_draining = False
        self.num_open = 0
        self.num_media_bytes = 0  # of open requests
        self.counters = {"stale_messages": 0, "refused_requests": 0, "decoded_pictures": 0}

    # From clients.

    def on_ingest(self, message: IngestMessage, frames: list[memoryview]) -> None:
        match message:
            case Hello():
                self._llm.send(message)
            case SubmitRequest():
                self._on_submit(message, frames)
            case AbortRequest():
                self._on_abort(message)
            case _:
                assert_never(message)

    def _on_submit(self, message: SubmitRequest, frames: list[memoryview]) -> None:
        known = self._requests.get(message.request_id)
        if known is not None and known.client_id != message.client_id:
            error = ErrorInfo(409, "the request_id belongs to another client", "request_id")
            self._llm.send(AbortRequest(client_id=message.client_id, request_id=message.request_id, attempt=message.attempt, error=error))
            return
        if known is not None and known.attempt > message.attempt:
            self.counters["stale_messages"] += 1
            return
        if known is not None and known.attempt == message.attempt:  # a query; what is still being prepared answers by itself
            if isinstance(known.reply, GenerateRequest):
                self._llm.send(msgspec.structs.replace(known.reply, num_received=message.num_received, is_query=True))
            elif known.reply is not None:
                self._llm.send(known.reply)
            return
        if known is not None:
            self._end(known)
        opened = self._requests[message.request_id] = OpenRequest(message.client_id, message.request_id, message.attempt)
        self.num_open += 1
        try:
            self._check_admission(message)
            self._hold_media(opened, sum(len(frame) for frame in frames))
        except RequestError as error:
            self._refuse(opened, error.info)
            return
        opened.task = self._tasks.create_task(self._prepare(opened, message, frames))

    def _check_admission(self, message: SubmitRequest) -> None:
        if self.is_draining:
            raise RequestError("the server is shutting down", status=503)
        if self.num_open > self._config.max_open_requests:
            raise RequestError(f"the server is overloaded: {self._config.max_open_requests} requests are open", status=503)
        if not message.messages:
            raise RequestError("messages must not be empty", field="messages")
        if len(message.messages) > MAX_MESSAGES:
            raise RequestError(f"there are {len(message.messages)} messages, the limit is {MAX_MESSAGES}", field="messages")
        if message.num_received < 0 or message.attempt < 1:
            raise RequestError("attempt and num_received count from 1 and 0", field="attempt")
        if len(message.output_token_ids) % 4:
            raise RequestError("output_token_ids are not whole numbers", field="output_token_ids")
        token_ids = unpack_int32(message.output_token_ids)
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < self._info.text.vocab_size:
            raise RequestError("output_token_ids are outside the vocabulary", field="output_token_ids")

    def _hold_media(self, opened: OpenRequest, num_bytes: int) -> None:
        """Counts encoded media that a request holds until it ends. Raises RequestError rather than let memory grow."""
        if opened.ended_at is not None:
            return
        opened.num_media_bytes += num_bytes
        self.num_media_bytes += num_bytes
        if self.num_media_bytes > self._config.max_open_media_mib * MIB:
            raise RequestError("the server is overloaded: too many media are open", status=503)

    def _on_abort(self, message: AbortRequest) -> None:
        known = self._requests.get(message.request_id)
        if known is not None and (known.client_id != message.client_id or known.attempt > message.attempt):
            self.counters["stale_messages"] += 1
            return
        if known is not None and known.task is not None:
            known.task.cancel()
        self._llm.send(AbortRequest(client_id=message.client_id, request_id=message.request_id, attempt=message.attempt))

    # One request's preparation.

    async def _prepare(self, opened: OpenRequest, message: SubmitRequest, frames: list[memoryview]) -> None:
        try:
            pictures, prompt = await self._read_request(opened, message, frames)
        except RequestError as error:
            self._refuse(opened, error.info)
        except Exception:  # whatever strange input made fail is that request's fault alone
            logger.exception("%s cannot be prepared", opened.request_id)
            self._refuse(opened, ErrorInfo(500, "the server cannot prepare this request", "messages"))
        else:
            self._announce(opened, message, pictures, prompt)

    async def _read_request(self, opened: OpenRequest, message: SubmitRequest, frames: list[memoryview]) -> tuple[list[Picture], Prompt]:
        parts = list(_located_images(message))
        if len(parts) > (limit := self._config.max_items_per_request):
            raise RequestError(f"the request has {len(parts)} pictures, the limit is {limit}", field="messages")
        tasks = [asyncio.ensure_future(self._picture(opened, part, field, frames)) for part, field in parts]
        try:
            pictures = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()  # one bad picture ends the request: nobody waits for the others
            raise
        merged = self._info.vision.merge_size**2
        counts = [picture.grid_thw.num_patches // merged for picture in pictures]
        return pictures, await self._in_thread(self._prompt.build, message.messages, counts.__getitem__)

    def _announce(self, opened: OpenRequest, message: SubmitRequest, pictures: Sequence[Picture], prompt: Prompt) -> None:
        """Metadata to the LLM, then every picture by hash to its ViT: in one go, so that all see them in order."""
        self._last_arrival += 1
        items: list[MmItem] = []
        for index, (picture, place) in enumerate(zip(pictures, prompt.placeholders, strict=True)):
            key = ChunkKey(opened.request_id, opened.attempt, index, 0)
            choice = self._router.choose(picture.mm_hash, picture.grid_thw.num_patches)
            self._pictures[key] = PictureState(key, picture, choice.vit, Order(self._last_arrival, index), is_wanted=not choice.is_known)
            opened.keys.append(key)
            epoch = self._context.sockets.epochs[WorkerId(Role.VIT, choice.vit)]
            chunk = MmChunk(picture.mm_hash, place.length, choice.vit, epoch)
            items.append(MmItem(place.offset, place.length, picture.grid_thw, picture.mm_hash, (chunk,)))
        opened.reply = GenerateRequest(
            client_id=opened.client_id,
            request_id=opened.request_id,
            attempt=opened.attempt,
            arrival=self._last_arrival,
            prompt_token_ids=pack_int32(prompt.token_ids),
            items=tuple(items),
            sampling=message.sampling,
            output_token_ids=message.output_token_ids,
            num_received=message.num_received,
            **self._origin,
        )
        self._llm.send(opened.reply)
        for key in opened.keys:
            state = self._pictures[key]
            self._vits[state.vit].send(self._encode_request(state))
            self._slots.expect(key, state.order)
            if state.is_wanted:
                self._slots.request(key, _pixel_bytes(state.picture.target))
        self._grant()

    async def _picture(self, opened: OpenRequest, part: ImagePart, field: str, frames: list[memoryview]) -> Picture:
        if part.url:
            data: bytes | memoryview = await self._fetcher.fetch(part.url, field)
            self._hold_media(opened, len(data))
        elif 0 <= part.frame < len(frames):
            data = frames[part.frame]
        else:
            raise RequestError("the picture has neither a URL nor data", field=field)
        return await self._in_thread(self._inspect, data, part.is_base64, field)

    def _inspect(self, data: bytes | memoryview, is_base64: bool, field: str) -> Picture:
        """Size and hash of a picture, from its header and its bytes; runs on a thread."""
        max_bytes = self._config.max_media_mib * MIB
        if is_base64:
            data = decode_base64(data, max_bytes, field)
        if len(data) > max_bytes:
            raise RequestError(f"the media is larger than {self._config.max_media_mib} MiB", field=field, status=413)
        size = read_size(data, self._config.max_image_pixels, field)
        target = smart_resize(size, self._info.vision)
        return Picture(data, field, target, grid_of(target, self._info.vision), content_hash(data, self._settings))

    async def _in_thread(self, function: Callable[..., R], *args: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _refuse(self, opened: OpenRequest, error: ErrorInfo) -> None:
        self.counters["refused_requests"] += 1
        opened.reply = AbortRequest(client_id=opened.client_id, request_id=opened.request_id, attempt=opened.attempt, error=error)
        self._llm.send(opened.reply)

    def _encode_request(self, state: PictureState) -> EncodeRequest:
        handle = None
        if state.slot is not None:
            target = state.picture.target
            handle = self._pool.lend(state.slot, (1, target.height, target.width, 3), "uint8")
        return EncodeRequest(
            key=state.key, arrival=state.order.arrival, position=state.order.position, mm_hash=state.picture.mm_hash,
            grid_thw=state.picture.grid_thw, pixels=handle, **self._origin,
        )  # fmt: skip

    # Pixels.

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
        pixels = self._pool.array(request.pixels)
        try:
            pixels[0] = await self._in_thread(decode, state.picture.data, state.picture.target, state.picture.field)
        except RequestError as broken:
            error = broken
        state.is_decoding = False
        self.counters["decoded_pictures"] += 1
        if state.is_over:
            self._drop(state)
        elif error is None:
            self._vits[state.vit].send(request)
        else:
            self._refuse_running(state, error.info)

    def _refuse_running(self, state: PictureState, error: ErrorInfo) -> None:
        """A picture of a request that runs already turns out broken."""
        opened = self._requests[state.key.request_id]
        self._llm.send(AbortRequest(client_id=opened.client_id, request_id=opened.request_id, attempt=opened.attempt, error=error))
        self._vits[state.vit].send(CancelEncode(keys=(state.key,), **self._origin))
        self._drop(state)

    def _drop(self, state: PictureState) -> None:
        """Forgets a picture and gives its slot to the next."""
        del self._pictures[state.key]
        self._router.finished(state.vit, state.picture.grid_thw.num_patches)
        self._slots.forget(state.key)
        if state.slot is not None:
            self._slots.allocator.free(state.slot)
        self._grant()

    # From ViTs and the LLM.

    def on_feedback(self, message: FeedbackMessage) -> None:
        if not self._context.is_current(message):
            self.counters["stale_messages"] += 1
            return
        match message:
            case PixelsReleased(key=key):
                if (state := self._pictures.get(key)) is not None:
                    self._finish(state)
            case EncodeMiss(key=key):
                state = self._pictures.get(key)
                if state is None:
                    return
                if not state.is_wanted:
                    state.is_wanted = True
                    self._slots.request(key, _pixel_bytes(state.picture.target))
                    self._grant()
                elif state.slot is not None and not state.is_decoding:
                    self._vits[state.vit].send(self._encode_request(state))  # sent when others' came first, and wanted now
            case ItemNotNeeded():
                self._cancel([ChunkKey(message.request_id, message.attempt, message.item, 0)])
            case RequestEnded():
                opened = self._requests.get(message.request_id)
                if opened is not None and opened.attempt == message.attempt and opened.ended_at is None:
                    self._end(opened)
            case _:
                assert_never(message)

    def _finish(self, state: PictureState) -> None:
        """No pixels are needed (any more). While a thread still writes them the slot stays."""
        if state.is_decoding:
            state.is_over = True
        else:
            self._drop(state)

    def _end(self, opened: OpenRequest) -> None:
        opened.ended_at = time.monotonic()
        self.num_open -= 1
        self.num_media_bytes -= opened.num_media_bytes
        if opened.task is not None:
            opened.task.cancel()
            opened.task = None
        self._cancel(opened.keys)
        opened.keys = []
        # Ended requests are remembered in the order of their end.
        self._requests[opened.request_id] = self._requests.pop(opened.request_id)

    def _cancel(self, keys: Iterable[ChunkKey]) -> None:
        by_vit: dict[int, list[ChunkKey]] = defaultdict(list)
        states = [state for key in keys if (state := self._pictures.get(key)) is not None]
        for state in states:
            self._slots.forget(state.key)  # all first, so that no freed slot goes to one that is cancelled too
        for state in states:
            by_vit[state.vit].append(state.key)
            if state.slot is None or state.is_decoding:
                self._finish(state)  # one whose pixels are with the ViT waits for their release
        for vit, of_vit in by_vit.items():
            self._vits[vit].send(CancelEncode(keys=tuple(of_vit), **self._origin))

    def tick(self, now: float) -> None:
        """Forgets requests that ended long ago; checks the books when nothing is open."""
        for opened in list(self._requests.values()):
            if opened.ended_at is not None and now - opened.ended_at > MEMORY_OF_ENDED_S:
                del self._requests[opened.request_id]
        if not self.num_open and not self._pictures:
            self._slots.allocator.check_integrity()
            assert not self._slots.allocator.num_used, "pixel slots are held for nobody"
            assert not any(self._router.outstanding), "patches are outstanding for nobody"

    async def close(self) -> None:
        await self._fetcher.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _pixel_bytes(target: ImageSize) -> int:
    return target.height * target.width * 3


def _located_images(message: SubmitRequest) -> Iterable[tuple[ImagePart, str]]:
    """The pictures of a request, each with the name of its field."""
    for number, chat_message in enumerate(message.messages):
        if not isinstance(chat_message.content, str):
            for index, part in enumerate(chat_message.content):
                if isinstance(part, ImagePart):
                    yield part, f"messages[{number}].content[{index}].image_url"
