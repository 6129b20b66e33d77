"""The ViT process: drain → schedule → encode (on a thread of its own) → answer.

The loop owns the sockets and all bookkeeping; the engine thread only gets tensors, and wakes the loop when a
batch is done, so that the loop handles releases and cancellations while the device works.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

import torch

from pipeline.adapters import read_adapters
from pipeline.config import MIB, Config
from pipeline.families import ModelInfo
from pipeline.process.compute_threads import spread_threads
from pipeline.process.core_sharing import Activity, CoreSharing
from pipeline.process.nodes import HEAD
from pipeline.process.phases import LOADING
from pipeline.process.process import WorkerContext
from pipeline.transport.ends import Receiver, Sender, Sink
from pipeline.transport.mapping_check import check_mapping
from pipeline.transport.memory import CudaBindings
from pipeline.transport.poller import Poller, Wakeup
from pipeline.transport.slots import SlotAllocator, align, pool_size
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.carrying import CarryMessage
from pipeline.wire.control import ControlMessage, WorkerState
from pipeline.wire.encoding import EncodeMessage, EncodeMiss, PixelsReleased
from pipeline.wire.errors import PipelineError
from pipeline.wire.topology import ENCODE, FEEDBACK, LLM, Role
from workers.model_info import model_info_of
from workers.nn.loader import choose_device, choose_dtype
from workers.vit.batcher import Batcher, Pending
from workers.vit.core import VitCore
from workers.vit.deadlines import Deadlines
from workers.vit.engine_thread import EngineThread
from workers.vit.engines.choice import EngineSpec, choose_engine, warm_up
from workers.vit.metrics import VitStats
from workers.vit.slices import SliceLimit

logger = logging.getLogger(__name__)
BUILDING = "building the encoder"  # phase of a start, of unknown length
MAX_SLOTS = 8192
STATS_INTERVAL_S = 1.0
MEASURED_PATCHES = 64
GPU_SLICE_MS = 10.0
GPU_BATCH_PATCHES, CPU_BATCH_PATCHES = 4096, 1024  # larger batches only raise latency, not throughput


def open_pool(
    context: WorkerContext, info: ModelInfo, config: Config, dtype: str, device_ordinal: int | None
) -> tuple[TensorPool, SlotAllocator]:  # fmt: skip
    largest = align(info.vision.largest_embedding(dtype).nbytes)
    nbytes = pool_size(config.vit.embedding_pool_mib * MIB, largest)
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
    info = model_info_of(context)
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
    # onnxruntime's thread pool cannot be resized: it never widens
    if device.type != "cpu" or config.vit.vit_engine == "onnxruntime":
        placement = dataclasses.replace(placement, wide_cores=())
    sharing = CoreSharing(
        Activity(Path(context.spec.run_dir)), context.worker, placement, torch.set_num_threads,
        spread=spread_threads if device.type == "cpu" else lambda cores: None,
        on_pause=context.recorder.move,
    )  # fmt: skip

    def after_work() -> None:
        context.recorder.move()
        if sharing.can_widen:
            sharing.adapt()

    spec = EngineSpec(
        info=info, folder=context.model_folder, dtype=dtype, device=device, num_threads=placement.num_threads,
        after_work=after_work, is_hurried=lambda: sharing.is_hurried,
        deadlines=Deadlines(context.recorder.expect, config.launcher.hang_timeout),
        cache=Path(config.launcher.cache_dir), limit=limit, quantization=config.vit_quantization,
        activations=config.llm.activation_quantization, adapters=read_adapters(config.model.lora),
        progress=lambda done, total: context.progress(LOADING if total > 1 else BUILDING, done, total),
    )  # fmt: skip
    engine = choose_engine(config.vit.vit_engine, spec)
    context.faults.fill(allocator)
    llms = {lead: context.sockets.sender(LLM, lead) for lead in config.leads}
    batcher = Batcher(
        allocator, lambda grid: info.vision.embedding(grid, dtype_name), context.quarantine.runs_alone,
        context.nodes.holder_of,
    )  # fmt: skip
    adapters, carrier = config.model.adapter_names, context.sender_to_carrier()
    feedback = _feedback(context, carrier)
    core = VitCore(context, batcher, pool, info.vision, llms, feedback, PoolMap(ordinal), adapters, carrier)
    core.announce()
    if device.type == "cuda":
        warm_up(engine, spec, max_patches)  # takes the engine's memory before the LLM takes the rest
    elif config.vit.vit_engine == "onnxruntime":
        warm_up(engine, spec, MEASURED_PATCHES)  # measured, for the first deadline
    wakeup = Wakeup()
    thread = EngineThread(engine, device, sharing, wakeup)
    thread.start()
    context.ready(pool_bytes=pool.info.nbytes)
    _serve(context, control, inbox, core, thread, wakeup, limit, sharing)


def _feedback(
    context: WorkerContext, carrier: Sender[CarryMessage] | None
) -> Sink[PixelsReleased | EncodeMiss]:  # fmt: skip
    """To whoever holds the pixels: on another node than preprocess the carrier."""
    if carrier is not None and context.nodes.here != HEAD:
        return carrier
    return context.sockets.sender(FEEDBACK)


def _serve(
    context: WorkerContext, control: Receiver[ControlMessage], inbox: Receiver[EncodeMessage], core: VitCore,
    thread: EngineThread, wakeup: Wakeup, limit: SliceLimit, sharing: CoreSharing,
) -> None:  # fmt: skip
    """Drain → schedule → encode → answer, until the pipeline ends."""
    batcher, stats = core.batcher, VitStats(context.metrics, core, inbox)
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
                if dead.worker.role in (Role.PREPROCESS, Role.CARRIER):
                    context.pool_closed(dead.worker, dead.epoch - 1)
            died = []
        # not before `on_death`: a successor's messages must not meet the state of the dead worker
        while not died and (received := inbox.receive()) is not None:
            core.handle(received.message)
        if batch and (seconds := thread.take_done()) is not None:
            num_patches = sum(pending.grid_thw.num_patches for pending in batch)
            limit.observe(num_patches, seconds)
            stats.on_encoded(seconds)
            ids = [key.request_id for pending in batch for key in pending.waiters]
            context.tracer.span("encode", time.monotonic() - seconds, ids, num_patches)
            core.on_encoded(batch)
            context.recorder.record(())
            batch = []
            continue
        if not batch:
            batch, jobs = core.next_batch(limit.max_patches)
            if batch:
                ids = [key.request_id for pending in batch for key in pending.waiters]
                context.recorder.record(set(ids))
                context.tracer.begin("encode", ids)
                stats.on_begun(batch, time.monotonic())
                thread.encode(jobs)
            context.recorder.move()
        sharing.announce(bool(batch or batcher.num_pending))
        if time.monotonic() >= stats_due:
            stats_due = time.monotonic() + STATS_INTERVAL_S
            context.stats(num_open_requests=0)
            if not batcher.num_pending:
                batcher.check_integrity()
        (without_inbox if died else poller).wait(max(0.0, stats_due - time.monotonic()))
