"""Preprocess without its process: admits requests, fetches their media, renders their prompts, and tracks
them to their end.

A request's way: media are fetched, sizes and hashes read (`item_reader.py`) → `GenerateRequest` goes to the
LLM → each chunk is requested by hash from its ViT → chunks that no ViT has are decoded, in order, into the
pixel pool and sent (`chunks.py`). All waiting for one request happens in that request's own task.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import assert_never

import msgspec

from pipeline.adapters import read_adapters
from pipeline.config import PreprocessConfig
from pipeline.families import ModelInfo
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Sink
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import ChunkKey, Order
from pipeline.wire.clients import AbortRequest, Hello, IngestMessage, Preparing, QueryRequest, SubmitRequest
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import (
    EncodeMessage,
    EncodeMiss,
    FeedbackMessage,
    ItemNotNeeded,
    PixelsCopied,
    PixelsReleased,
    PromptComputed,
    RequestEnded,
)
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.generation import (
    GenerateRequest,
    LlmMessage,
    MmChunk,
    MmItem,
    RequestNotYours,
    RequestRefused,
)
from pipeline.wire.packing import pack_int32
from pipeline.wire.topology import Role, WorkerId
from workers.grammars.vocabulary import GrammarVocabulary
from workers.preprocess.chunks import QUEUE_IS_FULL, ChunkFlow
from workers.preprocess.credits import Credits
from workers.preprocess.fetch import Fetcher
from workers.preprocess.grammars import Grammars
from workers.preprocess.item_reader import ItemReader
from workers.preprocess.known_requests import KnownRequest, KnownRequests
from workers.preprocess.media import Item
from workers.preprocess.prompt import TokenizedPrompt
from workers.preprocess.prompt_reader import Prepared, PromptReader
from workers.preprocess.readers import MediaReaders, ReadLimits
from workers.preprocess.router import Encoded, GroupRouter, prefix_hashes
from workers.preprocess.shortages import refusal_of
from workers.preprocess.submission_checks import check_submission, num_held_bytes, tenant_of
from workers.preprocess.threads import FairThreads, Recording, Work, on_behalf_of

logger = logging.getLogger(__name__)
DECODES_PER_READER = 2  # so that no reader is idle, and the queue stays short enough for fair turns
CLIENTS_RETURN_S = 120.0  # after the predecessor's death, clients resubmit requests that it had begun


class Preprocessor:
    """Preprocess without its process. All runs in one event loop, except texts, hashes and decoding.

    Texts have threads of their own, so that they never wait for media.
    """

    def __init__(
        self, context: WorkerContext, config: PreprocessConfig, info: ModelInfo, pool: TensorPool,
        allocator: SlotAllocator,
        llms: Mapping[int, Sink[LlmMessage]], vits: Sequence[Sink[EncodeMessage]], tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        self._origin, self._nodes = context.origin, context.nodes
        self._context, self._config, self._info = context, config, info
        self._llms, self._tasks = llms, tasks
        self._groups = GroupRouter(list(llms))
        num_threads = max(2, context.spec.placement.num_threads)
        self.recording = Recording(context.recorder)
        # More threads than cores: one tenant never takes the last thread.
        self._text_threads = FairThreads(num_threads + 1, self.recording, "text")
        self._media_threads = FairThreads(num_threads + 2, self.recording, "media")
        self.fetcher = Fetcher(config)
        # A tenant leaves one reader to other tenants, a request one more to other requests of its tenant.
        num_readers = num_threads + 2
        limits = ReadLimits(
            config.picture_timeout_s,
            config.video_timeout_s,
            config.max_image_pixels,
            config.media_memory_mib,
        )
        self.readers = MediaReaders(pool.info.memory_fd, num_readers, limits, config.video_reader)
        node = context.spec.node
        num_near = len(vits) if node is None else node.vits_per_node
        items = ItemReader(config, info, num_near, self.fetcher, self._media_threads, self.readers)
        self.grammars = Grammars(GrammarVocabulary(info.folder, info.text.vocab_size, info.eos_token_ids))
        self.prompts = PromptReader(
            info, config.max_items_per_request, items, self._text_threads,
            context.config.model.max_model_len, context.tracer,
        )  # fmt: skip
        self.chunks = ChunkFlow(
            self._origin, pool, allocator, vits, context.epoch_of, context.nodes, tasks,
            num_readers * DECODES_PER_READER,
            self._on_broken_chunk, context.tracer, context.quarantine.runs_alone,
        )  # fmt: skip
        self._adapters = {one.name: one for one in read_adapters(context.config.model.lora)}
        self._requests = KnownRequests(Credits(config.max_open_requests, config.max_open_media_mib))
        self._last_arrival = 0
        self.is_draining = False
        self._started_at = time.monotonic()
        self.counters = {"stale_messages": 0, "refused_requests": 0}

    # From clients.

    def on_ingest(self, message: IngestMessage, frames: list[memoryview]) -> None:
        match message:
            case Hello():
                for lead in self._llms:
                    self._send(lead, message)
            case SubmitRequest():
                self._on_submit(message, frames)
            case QueryRequest():
                self._on_query(message)
            case AbortRequest():
                self._on_abort(message)
            case _:
                assert_never(message)

    def _on_submit(self, message: SubmitRequest, frames: list[memoryview]) -> None:
        known = self._known(message)
        if known is not None and known.client_id != message.client_id:
            self._refuse_foreign(known, message)
            return
        if known is not None and known.attempt >= message.attempt:
            self.counters["stale_messages"] += 1
            return
        if known is not None and known.ended_at is None:
            self._end(known)
        tenant = tenant_of(message)
        opened = KnownRequest(
            message.client_id, message.request_id, message.attempt, tenant, leads=message.leads,
            arrived_at=time.monotonic() if known is None else known.arrived_at,
        )  # fmt: skip
        self._requests.add(opened)
        # The group in which a lower attempt may still run. After the predecessor's death only the client may
        # know it.
        opened.lead = (
            known.lead if known is not None else message.lead if message.lead in self._llms else None
        )
        if opened.lead is not None and message.leads and opened.lead not in message.leads:
            self._abandon(message, opened.lead)  # that group does not know the client
            opened.lead = None
        if known is None and opened.lead is None and message.attempt > 1 and len(self._llms) > 1:
            for lead in self._llms:  # any group may still run the lower attempt
                self._abandon(message, lead)
        opened.was_begun = known.was_begun if known is not None else self._may_have_begun(message)
        try:
            if self.is_draining and not opened.was_begun:
                raise RequestError("the server is shutting down", status=503)
            self._requests.take_credit(opened)
            check_submission(message, self._info.text, self._config.allow_priority, tuple(self._adapters))
            self._requests.hold(opened, sum(len(frame) for frame in frames) + num_held_bytes(message))
        except RequestError as error:
            self._refuse(opened, error.info)
            return
        opened.task = self._tasks.create_task(self._prepare(opened, message, frames))

    def _known(self, message: SubmitRequest | QueryRequest | AbortRequest) -> KnownRequest | None:
        """The known request of a message's id. Another client's ended request counts as unknown, as the LLM
        remembers the id's owner, too; but not while chunks whose keys have the id are left."""
        known = self._requests.get(message.request_id)
        if known is None or known.client_id == message.client_id or known.ended_at is None:
            return known
        return known if self.chunks.has_chunks_of(known.request_id) else None

    def _refuse_foreign(self, known: KnownRequest, message: SubmitRequest | QueryRequest) -> None:
        refusal = RequestNotYours(
            client_id=message.client_id, request_id=message.request_id, attempt=message.attempt,
            **self._origin,
        )  # fmt: skip
        self._tell(known, refusal)

    def _on_query(self, message: QueryRequest) -> None:
        """Answers a client that has received nothing about an attempt for a while."""
        known = self._known(message)
        if known is None:
            # The predecessor passed it on, and its group knows it; or it was lost, and any group says so.
            lead = message.lead if message.lead in self._llms else None
            self._send(self._speaker(None) if lead is None else lead, message)
        elif known.client_id != message.client_id:
            self._refuse_foreign(known, message)
        elif known.attempt > message.attempt:
            self.counters["stale_messages"] += 1
        elif known.attempt == message.attempt and known.refusal is not None:
            # Also one that was passed on: if the refusal did not reach its group, it runs there without end.
            self._tell(known, known.refusal)
        elif known.attempt < message.attempt or known.was_passed_on:
            self._tell(known, message)
        elif known.ended_at is None:
            preparing = Preparing(
                client_id=known.client_id, request_id=known.request_id, attempt=known.attempt, **self._origin
            )  # fmt: skip
            self._tell(known, preparing)
        else:  # a group's death ended it, which its client does not know yet: a group answers "unknown"
            self._tell(known, message)

    def _abandon(self, message: SubmitRequest, lead: int) -> None:
        """Aborts the attempt before this one in that group, if it still runs there."""
        before = AbortRequest(
            client_id=message.client_id, request_id=message.request_id, attempt=max(0, message.attempt - 1)
        )  # fmt: skip
        self._send(lead, before)

    def _may_have_begun(self, message: SubmitRequest) -> bool:
        """Whether the predecessor may have begun this unknown request: only for a time after its death."""
        is_successor = self._origin["epoch"] > 1 and time.monotonic() - self._started_at < CLIENTS_RETURN_S
        return message.attempt > 1 and is_successor

    def _on_abort(self, message: AbortRequest) -> None:
        known = self._known(message)
        if known is not None and (known.client_id != message.client_id or known.attempt > message.attempt):
            self.counters["stale_messages"] += 1
            return
        if known is not None and not known.was_passed_on and known.ended_at is None:
            if message.index is not None:
                return  # no group runs it yet; the client repeats the abort of a choice
            known.was_begun = False
            self._end(known)  # no group knows it, so no `RequestEnded` will come
        lead = known.lead if known is not None else message.lead
        if lead is None or lead not in self._llms:
            lead = self._speaker(known)
        self._send(lead, message)

    def _send(self, lead: int, message: LlmMessage) -> None:
        """Sends a message about a request. An LLM that loads reads none for minutes: what its queue has no
        room for is lost, and the client asks again."""
        with contextlib.suppress(PipelineError):
            self._llms[lead].send(message)

    def _tell(self, opened: KnownRequest | None, message: LlmMessage) -> None:
        """Sends a message to a request's group; for a request without one, or unknown, to `_speaker`."""
        lead = opened.lead if opened is not None else None
        self._send(self._speaker(opened) if lead is None else lead, message)

    def _speaker(self, opened: KnownRequest | None) -> int:
        """A group to answer the client: one that serves and knows the client, if there is one."""
        return self._groups.candidates(opened.leads if opened is not None else ())[0]

    # One request's preparation.

    async def _prepare(self, opened: KnownRequest, message: SubmitRequest, frames: list[memoryview]) -> None:
        is_alone = self._context.quarantine.runs_alone(opened.request_id)
        on_behalf_of.set(Work(opened.request_id, is_alone, opened.tenant))
        self._context.tracer.follow(opened.request_id, opened.attempt, message.trace)
        start = time.monotonic()
        grammar = message.sampling.grammar
        try:
            # First: it costs little to refuse one before media are fetched.
            compiled = None if grammar is None else await self.grammars.compile(grammar)
            prepared = await self.prompts.read(
                message, frames, opened.tenant, functools.partial(self._requests.hold, opened),
                self._adapters[message.adapter].tower_key if message.adapter else b"",
            )  # fmt: skip
            # From here on nothing is awaited.
            self._check_chunks(opened.tenant, prepared.items)
            self._announce(opened, message, prepared, compiled)
        except RequestError as error:
            self._refuse(opened, error.info)
        except PipelineError as error:
            logger.warning("%s cannot be passed on: %s", opened.request_id, error)
            self._refuse(opened, QUEUE_IS_FULL)
        except Exception as error:  # a failure on strange input ends this request only
            logger.exception("%s cannot be prepared", opened.request_id)
            self._refuse(
                opened,
                refusal_of(
                    error,
                    RequestError("the server cannot prepare this request", field="messages", status=500),
                ).info,
            )
        self._context.tracer.span("prepare", start, [opened.request_id])

    def _check_chunks(self, tenant: str, items: Sequence[Item]) -> None:
        chunks = [chunk for item in items for chunk in item.chunks]
        if chunks and not self.chunks.shares.fits(tenant, len(chunks)):
            raise self.chunks.shares.refusal(
                tenant, len(chunks), "too many pictures and pieces of videos are open"
            )
        if (largest := max((chunk.pixel_bytes for chunk in chunks), default=0)) > self.chunks.largest:
            raise RequestError(
                f"a picture of {largest} bytes of pixels is larger than {self.chunks.largest}",
                field="messages",
            )

    def _announce(
        self, opened: KnownRequest, message: SubmitRequest, prepared: Prepared, grammar: bytes | None
    ) -> None:
        """Sends metadata to the LLM, then every chunk by hash to its ViT. Nothing is awaited in between, so
        all workers see the requests in one order. Raises PipelineError where a queue is full: then the
        request is to be refused."""
        media, prompt, positions, sampling = prepared
        spans_of_items = prompt.spans
        if message.sampling.max_tokens == 0:  # only the prompt's token ids are asked for
            media, spans_of_items = [], []
        self._last_arrival += 1
        items: list[MmItem] = []
        for item, spans in zip(media, spans_of_items, strict=True):
            items.append(MmItem(spans, item.mm_hash, item.kv_hash, ()))
        adapter = self._adapters.get(message.adapter)
        salt = message.cache_salt + (b"" if adapter is None else adapter.digest)
        of_tower = message.adapter if adapter is not None and adapter.adapts_tower else ""
        self._choose_group(opened, prompt, media, items, salt)
        assert opened.lead is not None
        for number, item in enumerate(media):
            routed: list[MmChunk] = []
            for index, chunk in enumerate(item.chunks):
                key = ChunkKey(opened.request_id, opened.attempt, number, index, opened.lead)
                num_tokens = self._info.vision.num_tokens(chunk.grid_thw)
                order = Order(self._last_arrival, len(opened.keys))
                owner = opened.tenant, message.trace, of_tower
                routed.append(self.chunks.route(key, chunk, order, num_tokens, *owner))
                opened.keys.append(key)
            items[number] = msgspec.structs.replace(items[number], chunks=tuple(routed))
        request = GenerateRequest(
            client_id=opened.client_id,
            request_id=opened.request_id,
            attempt=opened.attempt,
            arrival=self._last_arrival,
            prompt_token_ids=pack_int32(prompt.token_ids),
            positions=pack_int32(positions.rows),
            position_delta=positions.delta,
            items=tuple(items),
            sampling=sampling,
            choices=message.choices,
            priority=message.priority,
            cache_salt=message.cache_salt,
            adapter=message.adapter,
            tenant=opened.tenant,
            # Another machine has another clock.
            arrived_at=opened.arrived_at if self._nodes.is_here(WorkerId(Role.LLM, opened.lead)) else 0.0,
            trace=message.trace,
            **self._origin,
        )
        self._llms[opened.lead].send(request, () if grammar is None else (grammar,))
        opened.was_passed_on = True
        self.chunks.announce(opened.keys)

    def _choose_group(
        self, opened: KnownRequest, prompt: TokenizedPrompt, media: Sequence[Item], items: Sequence[MmItem],
        cache_salt: bytes,
    ) -> None:  # fmt: skip
        if len(self._llms) == 1 or opened.lead is not None:
            opened.lead = next(iter(self._llms)) if opened.lead is None else opened.lead
            return
        prefixes = prefix_hashes(prompt.token_ids, items, cache_salt)
        num_tokens = len(prompt.token_ids)
        opened.lead, opened.num_new_tokens = self._groups.choose(
            prefixes, num_tokens, opened.leads, self._encoded(media, items)
        )

    def _encoded(self, media: Sequence[Item], items: Sequence[MmItem]) -> list[Encoded]:
        """The chunks of a prompt that ViTs have encoded; none where all ViTs are near all groups."""
        if self._nodes.count == 1:
            return []
        router, leads = self.chunks.router, list(self._llms)
        return [
            Encoded(
                placed.stop,
                self._info.vision.num_tokens(chunk.grid_thw),
                self._nodes.leads_near(vit, leads),
            )
            for item, placed in zip(media, items, strict=False)
            for chunk in item.chunks
            if (vit := router.place_of(chunk.mm_hash)) is not None and vit in router.available
        ]

    def _refuse(self, opened: KnownRequest, error: ErrorInfo) -> None:
        self.counters["refused_requests"] += 1
        opened.was_begun = False
        opened.task = None  # else `_end` would cancel it, and it may be the current task
        self._end(opened)  # without `RequestEnded`: the group that answers may die before it sends that
        opened.refusal = self._refusal(opened, error)
        self._tell(opened, opened.refusal)

    def _refusal(self, opened: KnownRequest, error: ErrorInfo) -> RequestRefused:
        return RequestRefused(
            client_id=opened.client_id, request_id=opened.request_id, attempt=opened.attempt, error=error,
            **self._origin,
        )  # fmt: skip

    def _on_broken_chunk(self, key: ChunkKey, error: ErrorInfo) -> None:
        """Media of a running request turned out broken."""
        opened = self._requests.of(key.request_id)
        opened.refusal = self._refusal(opened, error)
        self._tell(opened, opened.refusal)

    # From the launcher, ViTs and the LLM.

    def on_states(self, states: Iterable[WorkerState], died: Iterable[WorkerState]) -> None:
        """The states of all workers. `died`: the workers among them that replaced a dead one."""
        states = list(states)
        self._groups.available = {
            state.worker.rank for state in states if state.is_ready and state.worker.role is Role.LLM
        } & set(self._llms)
        self.chunks.router.available = {
            state.worker.rank for state in states if state.is_ready and state.worker.role is Role.VIT
        }
        for dead in died:
            if dead.worker.role is Role.VIT:
                self.chunks.on_vit_death(dead.worker.rank)
            elif dead.worker.role is Role.CARRIER:
                self.chunks.on_carrier_death(dead.worker.rank)
            elif dead.worker.role is Role.LLM and dead.worker.rank in self._llms:
                self._on_group_death(dead.worker.rank)

    def _on_group_death(self, lead: int) -> None:
        """Ends the group's requests. Their clients resubmit them once they know its successor."""
        self._groups.forget(lead)
        for opened in [opened for opened in self._requests if opened.lead == lead]:
            if opened.ended_at is None:
                self._end(opened)
            opened.lead = None

    def on_feedback(self, message: FeedbackMessage) -> None:
        if not self._context.is_current(message):
            self.counters["stale_messages"] += 1
            return
        match message:
            case PixelsReleased(key=key):
                self.chunks.on_released(key)
            case PixelsCopied(key=key):
                self.chunks.on_copied(key)
            case EncodeMiss(key=key):
                self.chunks.on_miss(key)
            case ItemNotNeeded():
                opened = self._requests.get(message.request_id)
                if opened is not None and opened.attempt == message.attempt:
                    self.chunks.cancel([key for key in opened.keys if key.item == message.item])
            case PromptComputed():
                opened = self._attempt_of(message)
                if opened is not None and opened.num_new_tokens and opened.lead is not None:
                    opened.num_new_tokens = self._groups.computed(opened.lead, opened.num_new_tokens)
            case RequestEnded():
                if (opened := self._attempt_of(message)) is not None:
                    # A higher attempt bypasses the load check only if the LLM interrupted the request.
                    opened.was_begun = opened.was_begun and message.is_interrupted
                    if opened.ended_at is None:
                        self._end(opened)
            case _:
                assert_never(message)

    def _attempt_of(self, message: PromptComputed | RequestEnded) -> KnownRequest | None:
        """None for another client's use of the id, or an earlier attempt."""
        opened = self._requests.get(message.request_id)
        if opened is None or (opened.client_id, opened.attempt) != (message.client_id, message.attempt):
            return None
        return opened

    def _end(self, opened: KnownRequest) -> None:
        self._requests.end(opened, time.monotonic())
        self.chunks.cancel(opened.keys)
        opened.keys = []
        if opened.num_new_tokens and opened.lead is not None:
            self._groups.finished(opened.lead, opened.num_new_tokens)
            opened.num_new_tokens = 0

    def tick(self, now: float) -> None:
        """Forgets requests that ended long ago; checks integrity when nothing is open."""
        self._requests.forget(now, self.chunks.has_chunks_of)
        self.chunks.tick()
        if not self.num_open:
            self.chunks.check_integrity()
            assert not any(self._groups.outstanding.values()), "tokens are outstanding for nobody"
            self._requests.check_empty()

    @property
    def num_open(self) -> int:
        return self._requests.num_open

    @property
    def num_held_bytes(self) -> int:
        """Bytes of open requests' texts and encoded media."""
        return self._requests.credits.num_held_bytes

    async def close(self) -> None:
        await self.readers.close()
        await self.grammars.close()
        await self.fetcher.close()
        for threads in (self._text_threads, self._media_threads):
            threads.close()
