"""The preprocess process: sockets around the `Preprocessor`."""

from __future__ import annotations

import asyncio
import time

from pipeline.config import MIB, PreprocessConfig
from pipeline.process.process import (
    DRAIN_STATS_INTERVAL_S,
    ShutdownRequested,
    WorkerContext,
    limit_memory,
    run_async,
)
from pipeline.transport.ends import AsyncReceiver
from pipeline.transport.slots import SlotAllocator, align, pool_size
from pipeline.transport.tensors import TensorPool
from pipeline.wire.base import PoolOpened
from pipeline.wire.clients import IngestMessage
from pipeline.wire.control import ControlMessage
from pipeline.wire.encoding import FeedbackMessage
from pipeline.wire.topology import CONTROL, ENCODE, FEEDBACK, INGEST, LLM
from workers.model_info import model_info_of
from workers.preprocess.metrics import declare
from workers.preprocess.preprocessor import Preprocessor

BASE_MIB = 1024
COPIES_OF_MEDIA = 2  # in base64, and decoded
MAX_SLOTS = 4096
STATS_INTERVAL_S = 1.0
LIFE_INTERVAL_S = 0.5
STUCK_S = 30.0  # in one piece of work of a thread: the longest text takes some seconds


def main(context: WorkerContext) -> None:
    run_async(_run(context))


def allowed_mib(config: PreprocessConfig) -> int:
    """Memory for the work of this process; reading processes have a limit of their own."""
    if config.preprocess_memory_mib is not None:
        return config.preprocess_memory_mib
    return BASE_MIB + COPIES_OF_MEDIA * config.max_open_media_mib


async def _run(context: WorkerContext) -> None:
    # Bound first: messages of clients and LLMs queue from now on.
    max_message = (context.config.api.max_request_mib + 1) * MIB
    ingest = context.sockets.async_receiver(INGEST, max_message_bytes=max_message)
    feedback = context.sockets.async_receiver(FEEDBACK)
    control = context.sockets.async_subscriber(CONTROL)
    async with asyncio.TaskGroup() as tasks:
        _Process(context, ingest, feedback, tasks).start(control)


class _Process:
    """The loops around a `Preprocessor`. An exception in one of its tasks ends the process."""

    def __init__(
        self, context: WorkerContext, ingest: AsyncReceiver[IngestMessage],
        feedback: AsyncReceiver[FeedbackMessage], tasks: asyncio.TaskGroup,
    ) -> None:  # fmt: skip
        self._context, self._ingest, self._feedback, self._tasks = context, ingest, feedback, tasks
        config, sockets = context.config, context.sockets
        info = model_info_of(context)
        largest = align(info.largest_pixel_bytes)
        nbytes = pool_size(config.preprocess.pixel_pool_mib * MIB, largest)
        self._pool = TensorPool.on_host(str(context.worker), context.epoch, nbytes, MAX_SLOTS)
        self._vits = [sockets.sender(ENCODE, index) for index in range(config.num_vits)]
        self._carrier = context.sender_to_carrier()
        llms = {lead: sockets.sender(LLM, lead) for lead in config.leads}
        allocator = SlotAllocator(nbytes, largest, MAX_SLOTS)
        context.faults.fill(allocator)
        self._core = Preprocessor(
            context, config.preprocess, info, self._pool, allocator, llms, self._vits, tasks
        )
        declare(context.metrics, self._core, allocator, lambda: ingest.num_refused + feedback.num_refused)

    def start(self, control: AsyncReceiver[ControlMessage]) -> None:
        config = self._context.config.preprocess
        self._core.chunks.announce_pool()
        self._announce_to_carrier()
        limit_memory(allowed_mib(config))
        loops = (
            self._read_ingest(), self._read_feedback(), self._read_control(control),
            self._report(STATS_INTERVAL_S), self._show_life(),
        )  # fmt: skip
        for loop in loops:
            self._tasks.create_task(loop)
        self._context.ready(config.max_open_requests, pool_bytes=self._pool.info.nbytes)

    def _announce_to_carrier(self) -> None:
        """The carrier of this node, if there is one, reads pixels for those of other nodes."""
        if self._carrier is not None:
            self._carrier.send(PoolOpened(pool=self._pool.info, **self._context.origin))

    async def _read_ingest(self) -> None:
        while True:
            received = await self._ingest.receive()
            self._core.on_ingest(received.message, received.frames)

    async def _read_feedback(self) -> None:
        while True:
            self._core.on_feedback((await self._feedback.receive()).message)

    async def _read_control(self, control: AsyncReceiver[ControlMessage]) -> None:
        while True:
            state = (await control.receive()).message
            try:
                news = self._context.follow(state)
            except ShutdownRequested:
                await self._core.close()  # no process that reads media outlives the pipeline
                raise
            self._core.on_states(state.workers, news.died)
            if self._context.nodes.carrier in [dead.worker for dead in news.died]:
                self._announce_to_carrier()
            if news.is_draining:
                self._drain()

    def _drain(self) -> None:
        if not self._core.is_draining:
            self._core.is_draining = True
            self._tasks.create_task(self._report(DRAIN_STATS_INTERVAL_S))

    async def _report(self, interval: float) -> None:
        while True:
            self._core.tick(time.monotonic())
            self._context.stats(self._core.num_open)
            await asyncio.sleep(interval)

    async def _show_life(self) -> None:
        """Counts progress as long as the loop turns and no thread is stuck."""
        while True:
            if self._core.recording.longest_s(time.monotonic()) < STUCK_S:
                self._context.recorder.move()
            await asyncio.sleep(LIFE_INTERVAL_S)
