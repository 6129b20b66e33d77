"""A client's connection to the pipeline. It owns requests until their terminal message, whichever worker
dies.

Recovery is always resubmission: the same request_id, the next attempt, and the token ids received so far. The
launcher's state says what to resubmit (preprocess died: every request that no LLM has accepted; an LLM rank
died: every request of its group), or rank 0 does, which interrupts requests that needed something of a dead
neighbour. Outputs of earlier attempts are dropped; gaps are queried.

Each group of LLM ranks greets the client by itself: while one group is dead, the others serve. No request
waits forever: one that no worker accepts, or that cannot be submitted for lack of a group, ends after
`recovery_timeout`. A silent launcher whose process lives ends nothing.

Knows nothing of text: its outputs are token ids.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import assert_never

import msgspec

from pipeline.client.aborts import Aborts
from pipeline.client.groups import Groups
from pipeline.client.open_request import OpenRequest
from pipeline.process.flight_recorder import digest_of
from pipeline.process.liveness import LauncherLife
from pipeline.transport.cluster import Cluster, read_spec
from pipeline.transport.ends import AsyncReceiver, Sender
from pipeline.transport.sockets import Sockets
from pipeline.transport.tcp import RemotePipeline
from pipeline.wire.clients import (
    CLIENT_ID_BYTES,
    MAX_REQUEST_ID,
    PROTOCOL_VERSION,
    AbortRequest,
    Accepted,
    Hello,
    IngestMessage,
    Interrupted,
    OutputsMessage,
    Preparing,
    RequestFailed,
    RequestOutput,
    SubmitRequest,
    TokenOutputs,
    Welcome,
)
from pipeline.wire.control import ControlMessage, PipelineState, ReloadState, WorkerState
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.packing import unpack_int32
from pipeline.wire.topology import CONTROL, INGEST, OUTPUTS, Role, WorkerId

logger = logging.getLogger(__name__)
HELLO_INTERVAL_S, MAX_HELLO_INTERVAL_S = 0.1, 1.0
TICK_S = 1.0  # interval at which aborts are repeated and silent requests looked for
QUERY_AFTER_S = 10.0  # of silence before a request is queried
HEARTBEAT_TIMEOUT_S = 8.0  # of the launcher's silence (it sends once a second) before its process is checked
MAX_UNREAD = 8192  # outputs of one request that its caller has not read
MAX_JITTER_S = 0.05  # so that not all clients resubmit at once
OUTPUTS_IN_A_TURN = 8  # of the event loop: readers of many streams run between, and whatever else waits
TOO_SLOW = "the answer is not read as fast as it comes"
PREPROCESS, GATEWAY = WorkerId(Role.PREPROCESS), WorkerId(Role.GATEWAY)


class Connection:
    """Everything runs in the event loop that is current when `start` is called."""

    def __init__(self, place: Path | RemotePipeline, cluster: Cluster | None = None) -> None:
        """`place`: the pipeline's run directory, or its gateway's address and keys. `cluster`: for a worker
        of the pipeline, which reaches groups on other nodes."""
        self._is_remote = isinstance(place, RemotePipeline)
        owner = place.owner if isinstance(place, RemotePipeline) else b""
        self.client_id = owner + os.urandom(CLIENT_ID_BYTES - len(owner))
        self._sockets = Sockets(place, {}, cluster=cluster)
        self._reads_nodes_in = place if isinstance(place, Path) and cluster is None else None
        self._control: AsyncReceiver[ControlMessage] = self._sockets.async_subscriber(CONTROL)
        self._ingest: Sender[IngestMessage] | None = None
        self._life = LauncherLife(None if isinstance(place, RemotePipeline) else place)
        self.groups = Groups(self._sockets.epochs)
        self._hello = Hello(client_id=self.client_id, protocol=PROTOCOL_VERSION)
        self._greeting: asyncio.Task[None] | None = None
        self._welcome: asyncio.Future[Welcome] = asyncio.get_running_loop().create_future()
        self._open: dict[str, OpenRequest] = {}
        self.aborts = Aborts()
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat = time.monotonic()
        self.end: ErrorInfo | None = None  # set while the pipeline is gone
        self._is_silent = False  # `end` is set only because the launcher is silent: it may come back
        self.is_draining = False
        self.workers: tuple[WorkerState, ...] = ()
        self.reload = ReloadState()
        self.counters = {"stale_outputs": 0, "gaps": 0, "resubmitted": 0, "given_up": 0}

    async def start(self, timeout_s: float) -> Welcome:
        """Waits until the pipeline answers.

        Raises PipelineError if it does not within `timeout_s`, or ends meanwhile.
        """
        self._start_task(self._read_control())
        try:
            welcome = await asyncio.wait_for(asyncio.shield(self._welcome), timeout_s)
        except TimeoutError:
            await self.close()
            hint = "; is the client's key known there, and the server's key right?" if self._is_remote else ""
            raise PipelineError(
                f"no pipeline answered at {self._sockets.site.name} within {timeout_s:.0f} s{hint}"
            ) from None
        self._start_task(self._watch())
        return welcome

    async def close(self) -> None:
        """Aborts the open requests, which fail with status 503, and leaves."""
        for opened in list(self._open.values()):
            self._give_up(opened, ErrorInfo(503, "the client was closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._ingest = None  # so that a delayed `_submit_held` sends nothing
        self._sockets.close(linger_ms=200)
        self._life.close()

    @property
    def num_open(self) -> int:
        return len(self._open)

    def is_open(self, request_id: str) -> bool:
        return request_id in self._open

    @property
    def limits(self) -> Welcome:
        return self._welcome.result()

    # Messages to the pipeline.

    def submit(self, request: SubmitRequest, frames: list[bytes | memoryview]) -> OpenRequest:
        """Submits a request, or holds it until a group serves. Raises RequestError for a refused one."""
        request_id = request.request_id
        if self.end is not None:
            raise RequestError.from_info(self.end)
        if self.is_draining:
            raise RequestError("the server is shutting down", status=503)
        if len(self._open) >= self.limits.max_requests:
            raise RequestError(f"{self.limits.max_requests} requests are open already", status=429)
        if len(request_id) > MAX_REQUEST_ID:
            raise RequestError(f"request_id may have {MAX_REQUEST_ID} characters", field="request_id")
        if request_id in self._open or request_id in self.aborts:
            raise RequestError(f"request_id {request_id!r} is in use", field="request_id")
        try:
            size = len(msgspec.msgpack.encode(request)) + sum(len(frame) for frame in frames)
        except UnicodeEncodeError:
            raise RequestError("the text is not valid Unicode", field="messages") from None
        except (OverflowError, RecursionError):
            raise RequestError("a number does not fit 64 bits", field="messages") from None
        if size > self.limits.max_request_bytes:
            raise RequestError(
                f"the request has {size} bytes, the limit is {self.limits.max_request_bytes}",
                status=413,
                field="messages",
            )
        opened = self._open[request_id] = OpenRequest(request, frames, heard=time.monotonic())
        if self.groups.known:
            self._send_request(opened)
        else:
            opened.is_held, opened.waits_since = True, opened.heard
        return opened

    def _send_request(self, opened: OpenRequest) -> None:
        """Sends the submission, for one of the groups that know this client."""
        opened.hear(time.monotonic())
        opened.asked = -math.inf
        opened.request = request = msgspec.structs.replace(opened.request, choices=opened.progress())
        if len(self.groups.leads) > 1:
            leads = tuple(self.groups.known)
            lead = request.lead if request.lead in leads else None
            request = opened.request = msgspec.structs.replace(request, leads=leads, lead=lead)
        if not opened.has_tokens:
            opened.generation = self.reload.generation
        self._send(request, opened.frames)

    def _send(self, message: IngestMessage, frames: Sequence[bytes | memoryview] = ()) -> None:
        if self._ingest is not None:
            self._ingest.send(message, frames)

    def finish(self, request_id: str) -> None:
        """The caller has read the request's terminal message."""
        self._open.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """Aborts an open request; the abort is repeated until the pipeline has answered."""
        opened = self._open.pop(request_id)
        indexes = {index for index, choice in enumerate(opened.choices) if not choice.is_over}
        self._start_abort(opened.request, None, indexes)

    def abort_choice(self, request_id: str, index: int) -> None:
        """Aborts one choice while other choices of the request are open; repeated likewise."""
        if (opened := self._open.get(request_id)) is None:
            return  # the request was given up, and so aborted as a whole
        opened.choices[index].is_over = True
        self._start_abort(opened.request, index, {index})

    def _start_abort(self, request: SubmitRequest, index: int | None, indexes: set[int]) -> None:
        message = AbortRequest(
            client_id=self.client_id, request_id=request.request_id, attempt=request.attempt, index=index,
            lead=request.lead,
        )  # fmt: skip
        self.aborts.add(message, indexes)
        self._send(message)

    def _give_up(self, opened: OpenRequest, reason: ErrorInfo) -> None:
        opened.fail(reason)
        self.abort(opened.request.request_id)

    # Recovery.

    def _interrupt(self, opened: OpenRequest, reason: str, died: Role | None) -> None:
        """The attempt is over: holds the request for resubmission, or gives it up.

        `died`: the role of a worker that died while it executed the request; None if none did.
        """
        if opened.is_held or opened.is_over:
            return
        if opened.has_tokens and opened.generation != self.reload.generation:
            self._give_up_replaced(opened)
            return
        request = opened.request
        if opened.has_progress:
            opened.deaths.clear()
        # Deaths count per role: a request that was only a neighbour of a fatal one, in all roles, goes on.
        elif died is not None:
            opened.deaths[died] += 1
        if died is not None and opened.deaths[died] >= self.limits.max_attempts:
            self.counters["given_up"] += 1
            times = f"{opened.deaths[died]} times" if opened.deaths[died] > 1 else "once"
            what = (
                f"the request was given up: {reason} while it was executing there, {times} in a row "
                f"({self.limits.max_attempts} are allowed)"
            )
            self._give_up(opened, ErrorInfo(503, what))
            return
        if opened.on_interrupted is not None:
            opened.on_interrupted(request.attempt, reason)
        logger.info("%s was interrupted (%s): it is submitted again", request.request_id, reason)
        self.aborts.forget(request.request_id)
        opened.begin_attempt(time.monotonic())
        self._go_on()

    def _give_up_replaced(self, opened: OpenRequest) -> None:
        """Gives up a request whose tokens come from replaced weights: new weights must not continue them."""
        self.counters["given_up"] += 1
        self._give_up(opened, ErrorInfo(503, "the model's weights were replaced before the answer was whole"))

    def _go_on(self) -> None:
        """If a group knows this client, completes the start and submits held requests."""
        if not (known := self.groups.known):
            return
        if not self._welcome.done():
            self._welcome.set_result(next(iter(known.values())))
        if any(opened.is_held for opened in self._open.values()):
            asyncio.get_running_loop().call_later(random.uniform(0, MAX_JITTER_S), self._submit_held)

    def _submit_held(self) -> None:
        if not self.groups.known:
            return
        held = [opened for opened in self._open.values() if opened.is_held and not opened.is_over]
        if held:
            self._send(self._hello)  # first: this client may have been cut off without noticing
        for opened in held:
            if opened.has_tokens and opened.generation != self.reload.generation:
                self._give_up_replaced(opened)
                continue
            opened.is_held = False
            self.counters["resubmitted"] += opened.request.attempt > 1
            self._send_request(opened)

    def _on_death(self, successor: WorkerState) -> None:
        worker, executed = successor.worker, successor.executed
        is_group = worker.role is Role.LLM and worker.rank in self.groups.leads
        # All messages queued in the gateway are lost, and the LLM took this client as having left.
        is_gateway = worker == GATEWAY and self._is_remote
        if worker != PREPROCESS and not is_group and not is_gateway:
            return
        if is_gateway:
            self.groups.forget_welcomes()
        for opened in list(self._open.values()):
            if not opened.is_accepted or is_gateway or (is_group and opened.request.lead == worker.rank):
                was_executing = digest_of(opened.request.request_id) in executed
                self._interrupt(opened, f"{worker} died", worker.role if was_executing else None)

    # Messages from the pipeline.

    async def _read_control(self) -> None:
        while True:
            state = (await self._control.receive()).message
            self._heartbeat = time.monotonic()
            if state.end is None:
                self._on_state(state)
            else:
                reason = f"the server has stopped{': ' if state.end else ''}{state.end}"
                self._fail(reason)
                if not self._welcome.done():
                    self._welcome.set_exception(PipelineError(reason))

    def _on_state(self, state: PipelineState) -> None:
        self.is_draining, self.workers, self.reload = state.is_draining, state.workers, state.reload
        self.groups.on_states(state.workers)
        if self._is_silent:
            self.end, self._is_silent = None, False
        if state.nodes and self._reads_nodes_in is not None:
            self._sockets.reach(Cluster(read_spec(self._reads_nodes_in), ()))
            self._reads_nodes_in = None
        renewed = self._sockets.follow(state)
        if self.groups.leads:
            for worker in state.workers:
                if worker.worker in renewed:
                    self._on_death(worker)
        elif {PREPROCESS, *(WorkerId(Role.LLM, lead) for lead in state.leads)} <= set(self._sockets.epochs):
            self._connect(state.leads)
        if self.groups.ungreeted:
            self._say_hello()
        self._go_on()

    def _connect(self, leads: Sequence[int]) -> None:
        self.groups.leads = tuple(leads)
        self._ingest = self._sockets.sender(INGEST)
        for lead in leads[:1] if self._is_remote else leads:  # a gateway has one socket for all leads
            self._start_task(
                self._read_outputs(self._sockets.async_subscriber(OUTPUTS, self.client_id, lead))
            )

    def _start_task(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """A task whose failure ends every request, so that none waits forever."""

        def on_done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("the client library failed", exc_info=error)
                self._fail(f"the client library failed: {type(error).__name__}")

        task = asyncio.create_task(work)
        task.add_done_callback(on_done)
        self._tasks.add(task)
        return task

    def _say_hello(self) -> None:
        """Repeats `Hello` until every serving group has answered."""

        async def say_hello() -> None:
            pause_s = HELLO_INTERVAL_S
            while self.groups.ungreeted:
                self._send(self._hello)
                await asyncio.sleep(pause_s)
                pause_s = min(1.5 * pause_s, MAX_HELLO_INTERVAL_S)  # a group may be in a long step

        if self._greeting is None or self._greeting.done():
            self._greeting = self._start_task(say_hello())

    async def _read_outputs(self, outputs: AsyncReceiver[OutputsMessage]) -> None:
        while True:
            message = (await outputs.receive()).message
            match message:
                case Welcome():
                    self._accept_welcome(message)
                case Preparing():
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        opened.is_asking, opened.waits_since = False, None
                case Accepted():
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        self._on_accepted(opened, message)
                case TokenOutputs():
                    for number, output in enumerate(message.outputs, 1):
                        self._take(output)
                        if number % OUTPUTS_IN_A_TURN == 0:
                            await asyncio.sleep(0)
                case RequestFailed():
                    self.aborts.forget(message.request_id)
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        opened.fail(message.error)
                case Interrupted():
                    self.aborts.forget(message.request_id)
                    if (opened := self._find(message.request_id, message.attempt)) is not None:
                        self._interrupt(opened, message.reason, message.died)
                case _:
                    assert_never(message)

    def _on_accepted(self, opened: OpenRequest, message: Accepted) -> None:
        """The group runs the attempt. Gives the request up if a picture has changed since an earlier attempt:
        its tokens were about another picture."""
        opened.is_accepted, opened.num_prompt_tokens, opened.waits_since = (
            True,
            message.num_prompt_tokens,
            None,
        )
        opened.prompt_token_ids = tuple(unpack_int32(message.prompt_token_ids).tolist())
        opened.hear(time.monotonic())
        opened.request = msgspec.structs.replace(opened.request, lead=message.sender.rank)
        if opened.mm_hashes is not None and opened.mm_hashes != message.mm_hashes:
            self._give_up(
                opened,
                ErrorInfo(
                    409,
                    "a picture's URL gives another picture than before the request was interrupted",
                    "messages",
                ),
            )
        opened.mm_hashes = message.mm_hashes

    def _accept_welcome(self, welcome: Welcome) -> None:
        """From now on that group may run this client's requests."""
        if welcome.protocol != PROTOCOL_VERSION:
            if not self._welcome.done():
                self._welcome.set_exception(
                    PipelineError(
                        f"the pipeline speaks protocol {welcome.protocol}, this client {PROTOCOL_VERSION}"
                    )
                )
            return
        self.groups.on_welcome(welcome)
        self._go_on()

    def _find(self, request_id: str, attempt: int) -> OpenRequest | None:
        opened = self._open.get(request_id)
        if opened is None or opened.request.attempt != attempt:
            self.counters["stale_outputs"] += 1
            return None
        opened.heard = time.monotonic()
        return opened

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self.aborts.on_end_of_choice(output)
        opened = self._find(output.request_id, output.attempt)
        if opened is None or not 0 <= output.index < len(opened.choices):
            return
        if not opened.take(output):
            self.counters["gaps"] += 1
            self._query(opened)
        elif opened.events.qsize() > MAX_UNREAD and not opened.is_over:
            self._give_up(opened, ErrorInfo(503, TOO_SLOW))

    def _query(self, opened: OpenRequest) -> None:
        """Queries an attempt for its state and missed tokens. The answer says if it is unknown."""
        if opened.is_asking or opened.is_held or opened.is_over:
            return
        opened.is_asking, opened.asked = True, time.monotonic()
        self._send(opened.query())

    async def _watch(self) -> None:
        """Repeats aborts, queries silent requests, gives up requests that wait too long, notices the
        launcher's end."""
        last, stood_still = time.monotonic(), False
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            if (
                now - last > 2 * TICK_S
            ):  # this process was stopped: messages that came meanwhile are read first
                last, stood_still = now, True
                self._heartbeat = now
                for opened in self._open.values():
                    opened.hear(now)
                continue
            asks_all, last, stood_still = stood_still, now, False  # this client may have been cut off
            if self.end is None and self._has_ended(now):
                self._fail("the server no longer answers")
                self._is_silent = True
            for abort in self.aborts.due():
                self._send(abort)
            for opened in list(self._open.values()):
                if not opened.is_over:
                    self._look_after(opened, now, asks_all)

    def _has_ended(self, now: float) -> bool:
        """Whether the silent launcher has ended.

        A stopped or swapped-out launcher has not: the workers serve meanwhile.
        """
        silent_s = now - self._heartbeat
        if silent_s <= HEARTBEAT_TIMEOUT_S:
            return False
        if (is_over := self._life.is_over()) is not None:
            return is_over
        # The process cannot be checked from another machine, and the gateway may be down for a while.
        return silent_s > max(HEARTBEAT_TIMEOUT_S, self.limits.recovery_timeout)

    def _look_after(self, opened: OpenRequest, now: float, asks_all: bool) -> None:
        """Called once a second: gives a request up, or queries it, if it has been silent too long."""
        timeout_s = self.limits.recovery_timeout
        if opened.waits_since is not None and now - opened.waits_since > timeout_s:
            self.counters["given_up"] += 1
            self._give_up(opened, ErrorInfo(503, f"the server did not recover within {timeout_s:.0f} s"))
            return
        if opened.is_held:
            return
        if self.groups.is_in_long_step(opened.request.lead):
            opened.hear(now)
        patience_s = max(timeout_s, 3 * TICK_S)  # time enough for a query and its answer
        # The launcher reports the death of an accepted request's worker, unless it is silent itself.
        is_forsaken = not opened.is_accepted or now - self._heartbeat > patience_s
        if is_forsaken and opened.asked > opened.heard and now - opened.heard > patience_s:
            self.counters["given_up"] += 1
            self._give_up(opened, ErrorInfo(503, f"the server did not answer within {patience_s:.0f} s"))
            return
        query_after_s = QUERY_AFTER_S if opened.is_accepted else min(QUERY_AFTER_S, patience_s / 3)
        if asks_all or now - max(opened.silent_since, opened.asked) > query_after_s:
            # Hello first: it makes a client known again that was cut off for not reading.
            self._send(self._hello)
            opened.is_asking = False
            self._query(opened)

    def _fail(self, reason: str) -> None:
        self.end = ErrorInfo(503, reason)
        for opened in list(self._open.values()):
            if not opened.is_over:
                self._give_up(opened, self.end)  # with an abort: a pipeline that is only silent may run it
