"""The process of the HTTP endpoint."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from aiohttp import web

from pipeline.client.client import PipelineClient
from pipeline.config import ApiConfig
from pipeline.families import read_model_info
from pipeline.process.process import (
    DRAIN_STATS_INTERVAL_S,
    WAITING,
    ShutdownRequested,
    WorkerContext,
    limit_memory,
    run_async,
)
from pipeline.wire.errors import PipelineError
from pipeline.wire.messages import Drain, PipelineState, ReloadRequested, Retire, Shutdown
from pipeline.wire.topology import CONTROL
from workers.api.budget import memory_mib
from workers.api.connections import HttpRunner
from workers.api.server import ApiServer

logger = logging.getLogger(__name__)
BASE_MIB = 1024  # for connections, answers and tokenizer
COPIES_OF_BODIES = 2  # the allocator does not reuse at once what was given back
COPIES_OF_A_BODY = 4  # while one is decoded
START_TIMEOUT_S = 24 * 3600.0  # the launcher is the one who gives up
LAST_WORDS_S = 2.0  # for the answers of requests that a failure has ended
HANDLERS_END_S = 0.5  # for what is left then: bodies that still come in
STATS_INTERVAL_S = 0.5
WAITING_INTERVAL_S = 1.0
RETIRING_INTERVAL_S = 0.2
IDLE_CONNECTIONS_S = 3.0  # of who retires: a client may be about to send on one


def main(context: WorkerContext) -> None:
    run_async(_serve(context))


def allowed_mib(config: ApiConfig) -> int:
    """Memory that the work of this process may take."""
    return BASE_MIB + COPIES_OF_BODIES * memory_mib(config) + COPIES_OF_A_BODY * config.max_request_mib


async def _serve(context: WorkerContext) -> None:
    config = context.config
    control = context.sockets.async_subscriber(CONTROL)
    client = PipelineClient(context.spec.run_dir)
    info = read_model_info(context.model_folder)
    server = ApiServer(
        config.api,
        client,
        config.model.served_model_name,
        info,
        request_reload=lambda: context.status.send(ReloadRequested(**context.origin)),
        recovery_timeout_s=config.launcher.recovery_timeout,
    )
    limit_memory(allowed_mib(config.api))
    runner = HttpRunner(server.application(), shutdown_timeout=HANDLERS_END_S)
    await runner.setup()
    # The launcher listens, too: what comes while nobody accepts waits for our successor.
    sites = [web.SockSite(runner, socket.socket(fileno=fd)) for fd in context.fds]
    is_draining = False

    async def watch() -> None:
        nonlocal is_draining
        while True:
            message = (await control.receive()).message
            match message:
                case Drain() | PipelineState(is_draining=True) if not is_draining:
                    is_draining = True
                    tasks.create_task(report(DRAIN_STATS_INTERVAL_S))
                case Retire(worker=worker, epoch=epoch) if (worker, epoch) == (context.worker, context.epoch):
                    tasks.create_task(retire())
                case Shutdown():
                    server.give_up()
                    await _say_last_words(client, server)
                    raise ShutdownRequested

    async def retire() -> None:
        """Our successor accepts already: finishes what is open, serves what comes on open connections for the
        last time, and ends."""
        server.is_retiring = True
        for site in sites:
            await site.stop()
        server.handled_at = max(server.handled_at, time.monotonic())
        while server.num_handled or time.monotonic() - server.handled_at < IDLE_CONNECTIONS_S:  # noqa: ASYNC110
            await asyncio.sleep(RETIRING_INTERVAL_S)
        raise ShutdownRequested

    async def serve() -> None:
        for site in sites:
            await site.start()
        waiting = tasks.create_task(tell_what_is_waited_for(context))
        try:
            await client.start(START_TIMEOUT_S)
        except PipelineError:
            if not client.failure:
                raise
            server.give_up()
            return  # the launcher ends everything, and `watch` hears it too
        finally:
            waiting.cancel()
        server.set_ready()
        context.ready()
        await report(STATS_INTERVAL_S)

    async def report(interval: float) -> None:
        while True:
            context.recorder.move()
            context.stats(client.num_open, client.counters)
            await asyncio.sleep(interval)

    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            tasks.create_task(serve())
    finally:
        await runner.cleanup()
        await client.close()


async def tell_what_is_waited_for(context: WorkerContext) -> None:
    """The LLM may wait for a ViT that builds an engine: no wait of ours is too long."""
    while True:
        context.progress(WAITING + "the LLM", 0, 1)
        await asyncio.sleep(WAITING_INTERVAL_S)


async def _say_last_words(client: PipelineClient, server: ApiServer) -> None:
    """Waits until the handlers of open requests have told their clients, for a moment at most."""
    end = time.monotonic() + LAST_WORDS_S
    while (client.num_open or server.num_waiting) and time.monotonic() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # from the handler's last write to the socket
