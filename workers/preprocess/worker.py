"""The preprocess process: sockets around the `Preprocessor`."""

from __future__ import annotations

import asyncio
import time
from typing import assert_never

from pipeline.config import MIB, PreprocessConfig
from pipeline.process.process import (
    DRAIN_STATS_INTERVAL_S,
    ShutdownRequested,
    WorkerContext,
    limit_memory,
    run_async,
)
from pipeline.transport.ends import AsyncReceiver
from pipeline.transport.slots import SlotAllocator, align
from pipeline.transport.tensors import TensorPool
from pipeline.wire.messages import (
    Drain,
    FeedbackMessage,
    IngestMessage,
    PipelineState,
    PoolOpened,
    Retire,
    Shutdown,
)
from pipeline.wire.topology import CONTROL, ENCODE, FEEDBACK, INGEST, LLM
from workers.model_info import model_info_of
from workers.preprocess.preprocessor import Preprocessor

BASE_MIB = 1024
COPIES_OF_MEDIA = 2  # as they came, in base64, and decoded
MIN_POOL_CHUNKS = 3
MAX_SLOTS = 4096
STATS_INTERVAL_S = 1.0
LIFE_INTERVAL_S = 0.5
STUCK_S = 30.0  # in one piece of work of a thread: the longest text takes some seconds


def main(context: WorkerContext) -> None:
    run_async(_serve(context))


def allowed_mib(config: PreprocessConfig) -> int:
    """Memory that the work of this process may take; processes that read media have a limit of their own."""
    if config.preprocess_memory_mib is not None:
        return config.preprocess_memory_mib
    return BASE_MIB + COPIES_OF_MEDIA * config.max_open_media_mib


async def _serve(context: WorkerContext) -> None:
    config, sockets = context.config, context.sockets
    max_message = (config.api.max_request_mib + 1) * MIB
    ingest: AsyncReceiver[IngestMessage] = sockets.async_receiver(INGEST, max_message_bytes=max_message)
    feedback: AsyncReceiver[FeedbackMessage] = sockets.async_receiver(FEEDBACK)
    control = sockets.async_subscriber(CONTROL)
    info = model_info_of(context)
    largest = align(info.largest_pixel_bytes)
    nbytes = align(max(config.preprocess.pixel_pool_mib * MIB, MIN_POOL_CHUNKS * largest))
    pool = TensorPool.on_host(str(context.worker), context.epoch, nbytes, MAX_SLOTS)
    vits = [sockets.sender(ENCODE, index) for index in range(config.num_vits)]
    for vit in vits:
        vit.send(PoolOpened(pool=pool.info, **context.origin))
    limit_memory(allowed_mib(config.preprocess))
    async with asyncio.TaskGroup() as tasks:
        allocator = SlotAllocator(nbytes, largest, MAX_SLOTS)
        context.faults.fill(allocator)
        llms = {lead: sockets.sender(LLM, lead) for lead in config.leads}
        core = Preprocessor(context, config.preprocess, info, pool, allocator, llms, vits, tasks)

        async def read_ingest() -> None:
            while True:
                received = await ingest.receive()
                core.on_ingest(received.message, received.frames)

        async def read_feedback() -> None:
            while True:
                core.on_feedback((await feedback.receive()).message)

        def drain() -> None:
            if not core.is_draining:
                core.is_draining = True
                tasks.create_task(report(DRAIN_STATS_INTERVAL_S))

        async def read_control() -> None:
            while True:
                message = (await control.receive()).message
                match message:
                    case Shutdown():
                        await core.close()  # no process that reads media outlives the pipeline
                        raise ShutdownRequested
                    case Drain():
                        drain()
                    case PipelineState():
                        core.on_states(message.workers, context.follow(message))
                        if message.is_draining:
                            drain()
                    case Retire():
                        pass  # of an endpoint
                    case _:
                        assert_never(message)

        async def report(interval: float = STATS_INTERVAL_S) -> None:
            while True:
                core.tick(time.monotonic())
                context.stats(
                    core.num_open,
                    {
                        **core.counters,
                        "decoded_pictures": core.num_decoded,
                        "refused_messages": ingest.num_refused + feedback.num_refused,
                    },
                )
                await asyncio.sleep(interval)

        async def show_life() -> None:
            """As long as the loop turns, and no thread is stuck."""
            while True:
                if core.recording.longest_s(time.monotonic()) < STUCK_S:
                    context.recorder.move()
                await asyncio.sleep(LIFE_INTERVAL_S)

        for loop in (read_ingest, read_feedback, read_control, report, show_life):
            tasks.create_task(loop())
        context.ready(config.preprocess.max_open_requests, pool_bytes=nbytes)
