"""The ViT process: drain → schedule → encode (on a thread of its own) → answer.

The loop owns the sockets and all bookkeeping; the engine thread sees tensors only and wakes the loop when a
batch is done, so that releases and cancellations are heard while the device works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_never

import torch

from pipeline.config import MIB, Config
from pipeline.families import ModelInfo, VisionInfo, read_model_info
from pipeline.process.core_sharing import Activity, CoreSharing
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Poller, Receiver, Sink, Wakeup
from pipeline.transport.memory import CudaBindings
from pipeline.transport.slots import Order, SlotAllocator, align
from pipeline.transport.tensors import PoolGoneError, PoolMap, StaleHandleError, TensorPool, check_mapping
from pipeline.wire.errors import ErrorInfo, PipelineError
from pipeline.wire.messages import (
    CancelEncode,
    ControlMessage,
    EmbeddingReady,
    EncodeFailed,
    EncodeMessage,
    EncodeMiss,
    EncodeRequest,
    FeedbackMessage,
    LeaseRefused,
    LeaseReleased,
    LeaseRequest,
    LeaseSet,
    LlmMessage,
    PixelsReleased,
    PoolOpened,
    WorkerState,
)
from pipeline.wire.topology import ENCODE, FEEDBACK, LLM, Role
from workers.nn.loader import choose_device, choose_dtype
from workers.vit.batcher import Action, Batcher, LeaseGone, NeedPixels, Pending, PixelsDone, Ready, Refused
from workers.vit.deadlines import Deadlines
from workers.vit.engines.choice import Engine, EngineSpec, choose_engine, warm_up
from workers.vit.models.base import EncodeJob
from workers.vit.slices import SliceLimit

logger = logging.getLogger(__name__)
MIN_POOL_CHUNKS = 3
MAX_SLOTS = 8192
STATS_INTERVAL_S = 1.0
MEASURED_PATCHES = 64
GPU_SLICE_MS = 10.0
GPU_BATCH_PATCHES, CPU_BATCH_PATCHES = 4096, 1024  # more fill no core better, and what is done is there later


class VitCore:
    """The ViT without its process: messages in, messages out.

    `llms` are the ways to the ranks that lead a group.
    """

    def __init__(
        self, context: WorkerContext, batcher: Batcher, pool: TensorPool, info: VisionInfo,
        llms: Mapping[int, Sink[LlmMessage]], feedback: Sink[FeedbackMessage], pools: PoolMap,
    ) -> None:  # fmt: skip
        self._origin = context.origin
        self._is_current = context.is_current
        self.batcher, self._pool, self._info = batcher, pool, info
        self._llms, self._feedback = llms, feedback
        self._pools = pools
        self.counters = {"encodes": 0, "stale_messages": 0}

    def handle(self, message: EncodeMessage) -> None:
        if not self._is_current(message):
            self.counters["stale_messages"] += 1
            return
        match message:
            case PoolOpened():
                with contextlib.suppress(PoolGoneError):  # of a successor we shall hear
                    self._pools.open(message.pool)
            case EncodeRequest():
                order = Order(message.arrival, message.position)
                actions = self.batcher.on_request(
                    message.key,
                    order,
                    message.mm_hash,
                    message.grid_thw,
                    message.pixels,
                    message.tenant,
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
                self.batcher.cache.reconcile(message.sender.rank, message.lease_ids, message.last_lease_id)
                self._act(self.batcher.poll())
            case _:
                assert_never(message)

    def on_death(self, successor: WorkerState) -> None:
        """Of a neighbour; no batch may be under way, which might still read the memory of a dead one."""
        worker = successor.worker
        if worker.role is Role.PREPROCESS:
            self.batcher.forget_all()
            # else it has taken the dead one's place already
            if not self._pools.knows(str(worker), successor.epoch):
                self._pools.close(str(worker))
        elif worker.rank in self._llms:
            self._act(self.batcher.forget_group(worker.rank))
            self._llms[worker.rank].send(PoolOpened(pool=self._pool.info, **self._origin))

    def _act(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case NeedPixels(key):
                    self._feedback.send(EncodeMiss(key=key, **self._origin))
                case PixelsDone(key):
                    self._feedback.send(PixelsReleased(key=key, **self._origin))
                case Ready(key, lease_id, feature):
                    handle = self._pool.lend(feature.slot, feature.embedding.shape, feature.embedding.dtype)
                    self._llms[key.lead].send(
                        EmbeddingReady(key=key, lease_id=lease_id, embeddings=handle, **self._origin)
                    )
                case LeaseGone(key):
                    self._llms[key.lead].send(LeaseRefused(key=key, **self._origin))
                case Refused(key, reason):
                    self._llms[key.lead].send(
                        EncodeFailed(key=key, error=ErrorInfo(400, reason, "messages"), **self._origin)
                    )
                case _:
                    assert_never(action)

    def next_batch(self, max_patches: int) -> tuple[list[Pending], list[EncodeJob]]:
        """The chunks to encode now and their tensors.

        A chunk whose pixels cannot be right is refused here.
        """
        batch: list[Pending] = []
        jobs: list[EncodeJob] = []
        while not batch and (candidates := self.batcher.next_batch(max_patches)):
            for pending in candidates:
                try:
                    jobs.append(self._job(pending))
                    batch.append(pending)
                except StaleHandleError as error:
                    self._act(self.batcher.on_failed(pending, f"the pixels cannot be read: {error}"))
        self._act(self.batcher.poll())  # a grant may have evicted what others were waiting for
        return batch, jobs

    def _job(self, pending: Pending) -> EncodeJob:
        """Raises StaleHandleError when the pixels are gone or are not what was announced."""
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
        return EncodeJob(pixels, grid, self._pool.tensor(handle))

    def on_encoded(self, batch: Sequence[Pending]) -> None:
        self.counters["encodes"] += len(batch)
        self._act(self.batcher.on_encoded(batch))


class EngineThread:
    """Encodes one batch at a time; an error ends up in `take_done`, that is, in the worker's loop."""

    def __init__(self, engine: Engine, device: torch.device, sharing: CoreSharing, wakeup: Wakeup) -> None:
        self._engine, self._device, self._sharing, self._wakeup = engine, device, sharing, wakeup
        self._jobs: queue.SimpleQueue[Sequence[EncodeJob]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | float] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # which each thread has its own of
        while True:
            jobs = self._jobs.get()
            self._sharing.enter()
            start = time.monotonic()
            try:
                self._engine.encode(jobs)
            except BaseException as error:  # noqa: BLE001  raised again in the worker's loop
                self._done.put(error)
            else:
                self._done.put(time.monotonic() - start)
            self._wakeup.set()

    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        self._jobs.put(jobs)

    def take_done(self) -> float | None:
        """The seconds that the batch under way took; None while it is not encoded.

        Raises what the engine raised.
        """
        try:
            done = self._done.get_nowait()
        except queue.Empty:
            return None
        if isinstance(done, BaseException):
            raise done
        return done


def open_pool(
    context: WorkerContext, info: ModelInfo, config: Config, dtype: str, device_ordinal: int | None
) -> tuple[TensorPool, SlotAllocator]:  # fmt: skip
    largest = align(info.vision.largest_embedding(dtype).nbytes)
    nbytes = align(max(config.vit.embedding_pool_mib * MIB, MIN_POOL_CHUNKS * largest))
    allocator = SlotAllocator(nbytes, largest, MAX_SLOTS)
    name, transport = str(context.worker), config.vit.embedding_transport
    if device_ordinal is not None and transport != "host":
        try:
            pool = TensorPool.on_cuda(name, context.epoch, nbytes, MAX_SLOTS, device_ordinal, CudaBindings())
            try:
                check_mapping(pool.info, device_ordinal)
            except PipelineError:
                pool.close()
                raise
            return pool, allocator
        except PipelineError as error:
            if transport == "cuda_ipc":
                raise
            logger.warning("embeddings go through host memory: %s", error)
    elif transport == "cuda_ipc":
        raise ValueError("embedding_transport 'cuda_ipc' needs a GPU, but this ViT computes on the CPU")
    return TensorPool.on_host(name, context.epoch, nbytes, MAX_SLOTS), allocator


def main(context: WorkerContext) -> None:
    config = context.config
    control, inbox = context.control(), context.sockets.receiver(ENCODE, context.worker.rank)
    torch.set_num_threads(context.spec.placement.num_threads)
    info = read_model_info(context.model_folder, config.preprocess.min_pixels, config.preprocess.max_pixels)
    device = choose_device(config.model.device, context.spec.placement.device, is_shared=True)
    dtype = choose_dtype(config.model.dtype, device)
    dtype_name = str(dtype).removeprefix("torch.")
    ordinal = device.index if device.type == "cuda" else None
    pool, allocator = open_pool(context, info, config, dtype_name, ordinal)
    slice_ms = config.vit.vit_slice_ms
    if slice_ms is None and device.type == "cuda":
        slice_ms = GPU_SLICE_MS
    max_patches = config.vit.vit_max_batch_patches or (
        GPU_BATCH_PATCHES if device.type == "cuda" else CPU_BATCH_PATCHES
    )
    limit = SliceLimit(max_patches, slice_ms / 1000 if slice_ms else None)
    placement = context.spec.placement
    # which has threads of its own, as many as it began with
    if device.type != "cpu" or config.vit.vit_engine == "onnxruntime":
        placement = dataclasses.replace(placement, wide_cores=())
    sharing = CoreSharing(
        Activity(Path(context.spec.run_dir)), context.worker, placement, torch.set_num_threads
    )

    def after_work() -> None:
        context.recorder.move()
        if sharing.can_widen:
            sharing.adapt()

    spec = EngineSpec(
        info=info, folder=context.model_folder, dtype=dtype, device=device, num_threads=placement.num_threads,
        after_work=after_work, deadlines=Deadlines(context.recorder.expect, config.launcher.hang_timeout),
        cache=Path(config.launcher.cache_dir), limit=limit, progress=lambda done,
        total: context.progress("loading weights", done, total),
    )  # fmt: skip
    engine = choose_engine(config.vit.vit_engine, spec)
    context.faults.fill(allocator)
    llms, feedback = (
        {lead: context.sockets.sender(LLM, lead) for lead in config.leads},
        context.sockets.sender(FEEDBACK),
    )
    for llm in llms.values():
        llm.send(PoolOpened(pool=pool.info, **context.origin))
    batcher = Batcher(
        allocator, lambda grid: info.vision.embedding(grid, dtype_name), context.quarantine.runs_alone
    )
    core = VitCore(context, batcher, pool, info.vision, llms, feedback, PoolMap(ordinal))
    if device.type == "cuda":
        warm_up(engine, spec, max_patches)  # takes what memory it needs before the LLM takes the rest
    elif config.vit.vit_engine == "onnxruntime":
        warm_up(engine, spec, MEASURED_PATCHES)  # the first deadline has a measurement then
    wakeup = Wakeup()
    thread = EngineThread(engine, device, sharing, wakeup)
    thread.start()
    context.ready(pool_bytes=pool.info.nbytes)
    _serve(context, control, inbox, core, thread, wakeup, limit, sharing)


def _serve(
    context: WorkerContext, control: Receiver[ControlMessage], inbox: Receiver[EncodeMessage], core: VitCore,
    thread: EngineThread, wakeup: Wakeup, limit: SliceLimit, sharing: CoreSharing,
) -> None:  # fmt: skip
    """Drain → schedule → encode → answer, until the pipeline ends."""
    batcher = core.batcher
    poller, without_inbox = Poller(inbox, control, wakeup), Poller(control, wakeup)
    batch: list[Pending] = []
    died: list[WorkerState] = []
    stats_due = 0.0
    while True:
        wakeup.clear()
        died += context.read_control(control).died
        if died and not batch:
            for dead in died:
                core.on_death(dead)
                if dead.worker.role is Role.PREPROCESS:
                    context.pool_closed(dead.worker, dead.epoch - 1)
            died = []
        # else what successors say would meet what is left of the dead
        while not died and (received := inbox.receive()) is not None:
            core.handle(received.message)
        if batch and (seconds := thread.take_done()) is not None:
            num_patches = sum(pending.grid_thw.num_patches for pending in batch)
            limit.observe(num_patches, seconds)
            ids = (key.request_id for pending in batch for key in pending.waiters)
            context.tracer.span("encode", time.monotonic() - seconds, ids, num_patches)
            core.on_encoded(batch)
            context.recorder.record(())
            batch = []
            continue
        if not batch:
            batch, jobs = core.next_batch(limit.max_patches)
            if batch:
                context.recorder.record({key.request_id for pending in batch for key in pending.waiters})
                thread.encode(jobs)
            context.recorder.move()
        sharing.announce(bool(batch or batcher.num_pending))
        if time.monotonic() >= stats_due:
            stats_due = time.monotonic() + STATS_INTERVAL_S
            context.stats(
                0,
                {**core.counters, "leases": batcher.cache.num_leases, "refused_messages": inbox.num_refused},
            )
            if not batcher.num_pending:
                batcher.check_integrity()
        (without_inbox if died else poller).wait(max(0.0, stats_due - time.monotonic()))
