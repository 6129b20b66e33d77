"""The process of the HTTP endpoint."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import time
from pathlib import Path

from pipeline.client.client import PipelineClient
from pipeline.config import MIB, ApiConfig, ModelConfig
from pipeline.config.tls import ssl_context
from pipeline.families import ModelInfo
from pipeline.parsers.forms import ChatForms
from pipeline.parsers.registry import AUTO
from pipeline.process.lanes import MAX_UNREAD
from pipeline.process.phases import WAITING
from pipeline.process.process import (
    DRAIN_STATS_INTERVAL_S,
    ShutdownRequested,
    WorkerContext,
    limit_memory,
    run_async,
)
from pipeline.transport.ends import AsyncReceiver
from pipeline.wire.control import ControlMessage, KillRequested, LanesWatched, ReloadRequested
from pipeline.wire.errors import PipelineError
from pipeline.wire.lanes import LanesMessage
from pipeline.wire.topology import CONTROL, LANES
from workers.api.budget import memory_mib
from workers.api.launcher_requests import LauncherRequests
from workers.api.listener import Listener
from workers.api.response_store import STORED_BYTES
from workers.api.runner import HttpRunner
from workers.api.server import ApiServer
from workers.model_info import model_info_of

logger = logging.getLogger(__name__)
BASE_MIB = 1024  # for connections, answers and tokenizer
COPIES_OF_BODIES = 2  # the allocator does not reuse freed memory at once
COPIES_OF_A_BODY = 4  # while it is decoded
START_TIMEOUT_S = 24 * 3600.0  # so long that the launcher gives up first
LAST_WORDS_S = 2.0  # to answer the requests that a failure has ended
HANDLERS_END_S = 0.5  # for the handlers left then, which still read bodies
STATS_INTERVAL_S = 0.5
WAITING_INTERVAL_S = 1.0
RETIRING_INTERVAL_S = 0.2
MAX_LANES_BYTES = 4 * MIB
IDLE_CONNECTIONS_S = 3.0  # kept open while retiring: a client may be about to send a request
LANE_MESSAGES = "Messages in which workers told of their work, while a page showed the lanes"
COUNTED = {
    "stale_outputs": "Outputs of earlier attempts, dropped",
    "gaps": "Gaps in a request's outputs, asked for again",
    "resubmitted": "Requests submitted again after a worker's death",
    "given_up": "Requests given up after workers' deaths",
}


def main(context: WorkerContext) -> None:
    run_async(_run(context))


async def _run(context: WorkerContext) -> None:
    control = context.sockets.async_subscriber(CONTROL)
    lanes = context.sockets.async_receiver(
        LANES, max_message_bytes=MAX_LANES_BYTES, high_water_mark=MAX_UNREAD
    )
    process = _Process(context, model_info_of(context))
    limit_memory(allowed_mib(context.config.api))
    await process.run(control, lanes)


def allowed_mib(config: ApiConfig) -> int:
    """MiB of memory that this process may use."""
    bodies = COPIES_OF_BODIES * memory_mib(config) + COPIES_OF_A_BODY * config.max_request_mib
    return BASE_MIB + bodies + STORED_BYTES // MIB


def _launcher(context: WorkerContext) -> LauncherRequests:
    status, origin = context.status, context.origin
    return LauncherRequests(
        reload=lambda: status.send(ReloadRequested(**origin)),
        kill=lambda worker: status.send(KillRequested(worker=worker, **origin)),
        watch=lambda seconds: status.send(LanesWatched(seconds=seconds, **origin)),
    )


def _parser_names(config: ApiConfig, info: ModelInfo) -> tuple[str, str]:
    """Of calls and of thoughts. Options win over what the model's family says."""
    tools, reasoning = config.tool_call_parser, config.reasoning_parser
    return (
        info.tool_call_parser if tools == AUTO else tools,
        info.reasoning_parser if reasoning == AUTO else reasoning,
    )


def _samples(config: ModelConfig, info: ModelInfo) -> Path | None:
    """The folder of pictures that come with the model: only the embedded one has some."""
    return None if config.model else info.folder.parent / "samples"


class _Process:
    """The endpoint from its start to its end. It ends with an exception in one of its tasks."""

    def __init__(self, context: WorkerContext, info: ModelInfo) -> None:
        self._context = context
        config = context.config
        names = _parser_names(config.api, info)
        self._client = client = PipelineClient(
            context.spec.run_dir, None, None, *names, cluster=context.far_sites()
        )
        context.metrics.counters(COUNTED, lambda: client.counters)
        self._server = ApiServer(
            config.api,
            self._client,
            config.model.served_model_name,
            info,
            launcher=_launcher(context),
            recovery_timeout_s=config.launcher.recovery_timeout,
            forms=ChatForms.read(info.folder, *names),
            spans=context.tracer.otlp,
            tp_size=config.llm.tp,
            samples=_samples(config.model, info),
            adapters=config.model.adapter_names,
        )
        self._runner = HttpRunner(self._server.application(), shutdown_timeout=HANDLERS_END_S)
        context.metrics.counter("lane_messages", LANE_MESSAGES, lambda: self._server.lanes.num_messages)
        self._sites: list[Listener] = []
        self._tasks = asyncio.TaskGroup()
        self._is_draining = False

    async def run(self, control: AsyncReceiver[ControlMessage], lanes: AsyncReceiver[LanesMessage]) -> None:
        await self._runner.setup()
        # The launcher has the listening sockets, too: connections wait for a successor if this process dies.
        tls = ssl_context(self._context.config.api)
        self._sites = [
            Listener(self._runner, socket.socket(fileno=descriptor), tls) for descriptor in self._context.fds
        ]
        try:
            async with self._tasks:
                self._tasks.create_task(self._follow(control))
                self._tasks.create_task(self._read_lanes(lanes))
                self._tasks.create_task(self._serve())
        finally:
            await self._runner.cleanup()
            await self._client.close()

    async def _follow(self, control: AsyncReceiver[ControlMessage]) -> None:
        while True:
            try:
                news = self._context.follow((await control.receive()).message)
            except ShutdownRequested:
                self._server.give_up()
                await _say_last_words(self._client, self._server)
                raise
            if news.is_draining:
                self._drain()
            if news.is_retiring and not self._server.is_retiring:
                self._server.is_retiring = True
                self._tasks.create_task(self._retire())

    async def _read_lanes(self, lanes: AsyncReceiver[LanesMessage]) -> None:
        while True:
            self._server.lanes.on_work((await lanes.receive()).message)

    def _drain(self) -> None:
        if not self._is_draining:
            self._is_draining = True
            self._tasks.create_task(self._report(DRAIN_STATS_INTERVAL_S))

    async def _retire(self) -> None:
        """The successor accepts connections already. Finishes open requests, answers one last request on each
        open connection, and ends."""
        server = self._server
        for site in self._sites:
            await site.stop()
        server.handled_at = max(server.handled_at, time.monotonic())
        while server.num_handled or time.monotonic() - server.handled_at < IDLE_CONNECTIONS_S:  # noqa: ASYNC110
            await asyncio.sleep(RETIRING_INTERVAL_S)
        raise ShutdownRequested

    async def _serve(self) -> None:
        for site in self._sites:
            await site.start()
        waiting = self._tasks.create_task(tell_what_is_waited_for(self._context))
        try:
            await self._client.start(START_TIMEOUT_S)
        except PipelineError:
            if not self._client.failure:
                raise
            self._server.give_up()
            return  # the launcher ends the pipeline, and `_follow` receives that, too
        finally:
            waiting.cancel()
        gc.collect()
        gc.freeze()  # a full collection would walk all of this again, while streams wait
        self._server.set_ready()
        self._context.ready()
        await self._report(STATS_INTERVAL_S)

    async def _report(self, interval: float) -> None:
        while True:
            self._context.recorder.move()
            self._context.stats(self._client.num_open)
            await asyncio.sleep(interval)


async def tell_what_is_waited_for(context: WorkerContext) -> None:
    """Reports progress while the LLM starts, so that the launcher sees no hang: a ViT may build an engine."""
    while True:
        context.progress(WAITING + "the LLM", 0, 1)
        await asyncio.sleep(WAITING_INTERVAL_S)


async def _say_last_words(client: PipelineClient, server: ApiServer) -> None:
    """Waits up to `LAST_WORDS_S` until the handlers of open requests have answered their clients."""
    end = time.monotonic() + LAST_WORDS_S
    while (client.num_open or server.num_waiting) and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # from the handler's last write to the socket
