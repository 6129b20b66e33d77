"""Rank 0 without its process: messages in, steps, messages out. The one place that sends a request's terminal message.

    handle(message) … → step() → handle(message) … → step() → …

With overlap, `step` launches the next step before it takes the results of the one under way. A request that ends meanwhile has
its share of that step thrown away; leases that the step may still read are released when it is over.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from pipeline.ends import Sink, Subscription
from pipeline.errors import ErrorInfo, PipelineError
from pipeline.flight_recorder import digest_of
from pipeline.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    EmbeddingReady,
    EncodeFailed,
    EncodeMessage,
    FeedbackMessage,
    GenerateRequest,
    Hello,
    ItemNotNeeded,
    LeaseRefused,
    LlmMessage,
    Origin,
    PoolClosed,
    PoolOpened,
    Preparing,
    RequestEnded,
    RequestOutput,
    SequencePlan,
    SequenceStart,
    StepPlan,
    StepsMessage,
    Welcome,
    WorkerMessage,
    WorkerState,
    pack_int32,
)
from pipeline.sampling import FinishReason
from pipeline.tensors import PoolInfo
from pipeline.topology import Role, WorkerId
from pipeline.trace import Tracer
from workers.llm.clients import Clients, Ended, Interruption, Outcome, Publish, output_of
from workers.llm.leases import Leases, lease_of
from workers.llm.model_runner import StepResult
from workers.llm.request import Chunk, Lease, Request
from workers.llm.sampler import has_penalty
from workers.llm.scheduler import Schedule, Scheduled, Scheduler

logger = logging.getLogger(__name__)


class Launched(Protocol):
    has_run: bool  # already: the device computes nothing on its own

    def result(self) -> StepResult: ...


class Pools(Protocol):
    def open(self, info: PoolInfo) -> None: ...

    def close(self, pool_id: str) -> None: ...

    def knows(self, pool_id: str, epoch: int) -> bool: ...


class Runner(Protocol):
    @property
    def pools(self) -> Pools: ...

    def launch(self, plan: StepPlan) -> Launched: ...


@dataclass(slots=True)
class _Flight:
    """A step under way."""

    scheduled: list[Scheduled]
    num_decodes: int  # of them, in front
    launched: Launched
    started_at: float
    ended_at: float | None  # None: it runs on
    leases: list[Lease] = field(default_factory=list)  # of requests that ended meanwhile: it may still read them


class Engine:
    """`publish_step` hands a plan to the other ranks; None when there are none. Times are seconds of any steady clock.

    `epochs` are those of the living; `record` is told which requests execute from now on. `has_overlap`: a step is launched while the one
    before it runs, which pays where the device works by itself.
    """

    def __init__(
        self, origin: Origin, scheduler: Scheduler, runner: Runner, welcome: Welcome, merge_size: int, publish: Publish,
        publish_step: Callable[[StepsMessage], bool] | None, feedback: Sink[FeedbackMessage], vits: Sequence[Sink[EncodeMessage]],
        epochs: Mapping[WorkerId, int] | None = None, has_overlap: bool = False,
        clock: Callable[[], float] = time.perf_counter, tracer: Tracer | None = None, record: Callable[[Iterable[str]], None] | None = None,
    ) -> None:  # fmt: skip
        self.scheduler, self.runner = scheduler, runner
        self._origin, self._welcome, self._merge_size = origin, welcome, merge_size
        self._publish_step, self._feedback, self._clock, self._record = publish_step, feedback, clock, record
        self._epochs: Mapping[WorkerId, int] = {} if epochs is None else epochs
        self._clients, self._leases = Clients(origin, welcome, publish), Leases(origin, vits)
        self._num_ahead = int(has_overlap)
        self.requests: dict[str, Request] = {}
        self._under_way: deque[_Flight] = deque()
        self._started: list[SequenceStart] = []  # that the runner has not been told of
        self._step, self._step_end = 0, 0.0
        self._tracer = tracer
        self.is_wide = False  # steps run on all cores
        self.counters = {"steps": 0, "stale_messages": 0, "prompt_tokens": 0, "cached_tokens": 0, "output_tokens": 0, "interrupted": 0}

    @property
    def num_clients_cut_off(self) -> int:
        return self._clients.num_cut_off

    # What comes in.

    def handle(self, message: LlmMessage, now: float) -> None:
        if isinstance(message, WorkerMessage) and message.epoch < self._epochs.get(message.sender, 0):
            self.counters["stale_messages"] += 1
            return
        match message:
            case Hello():
                self._clients.greet(message.client_id, message.protocol)
            case GenerateRequest():
                self._on_generate(message, now)
            case AbortRequest():
                self._on_abort(message, now)
            case Preparing():
                self._clients.tell_preparing(message)
            case PoolOpened():
                self._send_step(message)  # first: the ranks open it together
                self.runner.pools.open(message.pool)
                for embedding in self._leases.take_unmapped():
                    self._on_embedding(embedding, now)
            case EmbeddingReady():
                self._on_embedding(message, now)
            case EncodeFailed():
                if not self._is_early(message, now) and self._is_wanted(self._find_chunk(message)):
                    self._end(self.requests[message.key.request_id], message.error, now)
            case LeaseRefused(key=key):
                if self._is_wanted(self._find_chunk(message)):
                    self.counters["interrupted"] += 1
                    self._end(self.requests[key.request_id], Interruption("preempted"), now)
            case _:
                assert_never(message)

    def on_death(self, successor: WorkerState, now: float) -> None:
        """Of a neighbour. Requests that needed something of it end here, to be submitted again; what has been read is not needed."""
        match successor.worker.role:
            case Role.VIT:
                while self._under_way:  # a step may be reading what was the dead one's
                    self._collect(self._under_way.popleft(), now)
                self._leases.forget_vit(successor.worker.rank, successor.epoch)
                hit = [request for request in self.requests.values() if request.forget_vit(successor.worker.rank, successor.epoch)]
                if not self.runner.pools.knows(name := str(successor.worker), successor.epoch):  # else it has taken the dead one's place already
                    self._send_step(PoolClosed(pool_id=name, pool_epoch=successor.epoch - 1, **self._origin))
                    self.runner.pools.close(name)
            case Role.PREPROCESS:
                hit = [request for request in self.requests.values() if any(chunk.is_awaited for chunk in request.chunks)]
            case _:
                return
        for request in hit:
            self.counters["interrupted"] += 1
            was_executing = digest_of(request.request_id) in successor.executed
            self._end(request, Interruption(f"{successor.worker} died", successor.worker.role if was_executing else None), now)

    def on_subscriptions(self, events: Iterable[Subscription], now: float) -> None:
        self._clients.on_subscriptions(events, now)

    def _find_chunk(self, message: EmbeddingReady | EncodeFailed | LeaseRefused) -> Chunk | None:
        key = message.key
        request = self.requests.get(key.request_id)
        if request is None or request.attempt != key.attempt:
            return None
        return next((chunk for chunk in request.chunks if chunk.item == key.item and chunk.index == key.chunk), None)

    def _is_wanted(self, chunk: Chunk | None) -> bool:
        """Its embeddings are waited for."""
        return chunk is not None and chunk.embeddings is None and not chunk.is_read  # also when it was lost: it comes earlier then

    def _on_generate(self, message: GenerateRequest, now: float) -> None:
        request_id = message.request_id
        if (known := self.requests.get(request_id) or self._clients.ended(request_id)) is not None and known.client_id != message.client_id:
            # Preprocess knows who uses it, unless it was restarted.
            self._tell_preprocess(request_id, message.attempt)
            in_use = ErrorInfo(409, f"request_id {request_id!r} is in use by another client", "request_id")
            self._clients.tell_failed(message.client_id, request_id, message.attempt, in_use)
            return
        if (ended := self._clients.ended(request_id)) is not None and ended.attempt >= message.attempt:
            self._tell_preprocess(request_id, message.attempt)
            self._clients.tell_ended(request_id, ended, message.num_received)
            return
        if (current := self.requests.get(request_id)) is not None:
            if current.attempt > message.attempt:
                self.counters["stale_messages"] += 1
                return
            if current.attempt == message.attempt:
                self._clients.tell_accepted(current)
                self._clients.tell_outputs(current.client_id, [output_of(current, message.num_received)])
                return
            self._forget(current)
        request = self.requests[request_id] = Request.from_wire(message, self._merge_size, self._welcome.max_model_len)
        self.scheduler.add(request)
        if refusal := self._refusal(request, message):
            self._end(request, refusal, now)
            self._leases.drop_early(request_id)
            return
        self.counters["prompt_tokens"] += len(request.prompt_token_ids)
        self._clients.tell_accepted(request)
        for early in self._leases.take_early(request_id):
            self.handle(early, now)

    def _refusal(self, request: Request, message: GenerateRequest) -> Outcome | None:
        """Why the request does not run, if it does not."""
        if request.client_id not in self._clients:
            return Interruption("its client had left")  # while its media were fetched
        if (protocol := self._clients.protocol_of(request.client_id)) is None:
            return Interruption("its client has to say hello again")  # it was away, and may not have noticed
        if protocol != PROTOCOL_VERSION:
            return ErrorInfo(400, f"the client speaks protocol {protocol}, the pipeline speaks protocol {PROTOCOL_VERSION}")
        if message.is_query:
            return Interruption("it is not known here")
        for chunk in request.chunks:
            if chunk.wire.vit_epoch < self._epochs.get(vit := WorkerId(Role.VIT, chunk.wire.vit), 0):
                return Interruption(f"{vit} died")
        limit, capacity = self._welcome.max_model_len, self.scheduler.cache.capacity
        if request.num_tokens >= limit:
            return ErrorInfo(400, f"the prompt has {request.num_tokens} tokens, which leaves no room in the model's context of {limit}", "messages")
        if request.max_num_tokens > capacity:
            reason = f"prompt and output of {request.max_num_tokens} tokens can never fit the KV cache of {capacity} tokens"
            return ErrorInfo(400, reason, "max_tokens")
        if len(request.output_token_ids) >= request.max_tokens:
            return ErrorInfo(400, f"all {request.max_tokens} output tokens are there already", "output_token_ids")
        return None

    def _on_abort(self, message: AbortRequest, now: float) -> None:
        """From the client, or from preprocess with the reason why the request cannot run."""
        if message.is_foreign:
            assert message.error is not None
            self._clients.tell_failed(message.client_id, message.request_id, message.attempt, message.error)
            return
        request = self.requests.get(message.request_id)
        ended = self._clients.ended(message.request_id)
        known = request or ended
        if known is not None and known.client_id != message.client_id:
            return
        if request is not None and request.attempt <= message.attempt:
            self._end(request, message.error or FinishReason.ABORT, now)
            return
        self._tell_preprocess(message.request_id, message.attempt)
        if ended is None or ended.attempt < message.attempt:
            ended = Ended(message.client_id, message.attempt, now, message.error or FinishReason.ABORT)
            self._clients.remember(message.request_id, ended)
            self._leases.drop_early(message.request_id)
        self._clients.tell_ended(message.request_id, ended, len(ended.output_token_ids))

    def _on_embedding(self, message: EmbeddingReady, now: float) -> None:
        self._leases.saw(message)
        if not self.runner.pools.knows(message.embeddings.pool_id, message.embeddings.epoch):
            self._leases.keep_unmapped(message)
            return
        if self._is_early(message, now):
            return
        chunk, lease = self._find_chunk(message), lease_of(message)
        if chunk is None or not self._is_wanted(chunk):
            self._leases.release([lease])
            return
        chunk.embeddings, chunk.lease = message.embeddings, lease

    def _is_early(self, message: EmbeddingReady | EncodeFailed, now: float) -> bool:
        """Keeps a message of an attempt that is not here yet."""
        request_id, attempt = message.key.request_id, message.key.attempt
        known = self.requests.get(request_id) or self._clients.ended(request_id)
        if known is not None and known.attempt >= attempt:
            return False
        self._leases.keep_early(message, now)
        return True

    # One step.

    def step(self, now: float) -> bool:
        """Launches the next step and sends what came of the one before (without overlap, of this one). False: there is nothing to do."""
        schedule = self.scheduler.schedule()
        for request in schedule.preempted:
            logger.debug("%s is preempted", request.request_id)
            self._give_back(request.take_all_leases())
        for admitted in schedule.admitted:
            self._on_admitted(*admitted)
        if schedule.is_alone:
            while self._under_way:
                self._collect(self._under_way.popleft(), now)
        if schedule.scheduled:
            self._launch(schedule)
        num_ahead = self._num_ahead if schedule.scheduled and not schedule.is_alone else 0
        has_work = bool(self._under_way)
        while len(self._under_way) > num_ahead:
            self._collect(self._under_way.popleft(), now)
        if self._record is not None and has_work:
            self._record([item.request.request_id for flight in self._under_way for item in flight.scheduled])
        return has_work

    def _on_admitted(self, request: Request, covered: int) -> None:
        """Of what the prefix cache covers nothing is needed; of the rest, what was read before a preemption is needed again."""
        self.counters["cached_tokens"] += covered
        missing = {chunk.item for chunk in request.chunks if chunk.embeddings is None and not chunk.is_lost}
        for number, item in enumerate(request.items):
            if number in missing and item.offset + item.length <= covered:
                self._feedback.send(ItemNotNeeded(request_id=request.request_id, attempt=request.attempt, item=number, **self._origin))
        self._leases.release(request.take_read_leases(covered))
        for chunk in request.chunks:
            if chunk.is_lost and not chunk.is_read and chunk.embeddings is None:
                self._leases.request_again(request, chunk)
            chunk.is_lost = False
        token_ids = [*request.prompt_token_ids, *request.output_token_ids] if has_penalty(request.sampling) else ()
        self._started.append(SequenceStart(request.slot, len(request.prompt_token_ids), request.sampling, pack_int32(token_ids)))

    def _launch(self, schedule: Schedule) -> None:
        plan = self.plan([_plan(item) for item in schedule.scheduled])
        self._send_step(plan)
        if self._record is not None:
            flights = [flight.scheduled for flight in self._under_way] + [schedule.scheduled]
            self._record({item.request.request_id for scheduled in flights for item in scheduled})
        started_at = self._clock()
        launched = self.runner.launch(plan)
        ended_at = self._clock() if launched.has_run else None
        self._under_way.append(_Flight(schedule.scheduled, schedule.num_decodes, launched, started_at, ended_at))

    def plan(self, sequences: Sequence[SequencePlan]) -> StepPlan:
        """The next step in the count."""
        self._step += 1
        started, self._started = self._started, []
        return StepPlan(step=self._step, started=tuple(started), sequences=tuple(sequences), is_wide=self.is_wide, **self._origin)

    def execute(self, sequences: Sequence[SequencePlan]) -> float:
        """Runs one step that belongs to no request, on all ranks; returns the seconds it took."""
        plan = self.plan(sequences)
        self._send_step(plan)
        start = self._clock()
        self.runner.launch(plan).result()
        return self._clock() - start

    def _collect(self, flight: _Flight, now: float) -> None:
        result = flight.launched.result()
        self._observe(flight)
        scheduled = flight.scheduled
        yielded = zip([item.request for item in scheduled if item.is_sampled], result.token_ids, result.logprobs, strict=True)
        sampled = {request.request_id: (request, token, logprobs) for request, token, logprobs in yielded if not request.is_over}
        for request, _, logprobs in sampled.values():
            request.logprobs.extend(logprobs)
        for item in scheduled:
            if not item.request.is_over and item.request.num_computed_tokens >= item.stop:  # else it was preempted and reads them again
                flight.leases += item.request.take_read_leases(item.stop)
        self._leases.release(flight.leases)
        finished = self.scheduler.update(scheduled, {request_id: [token] for request_id, (_, token, _) in sampled.items()})
        self.counters["steps"] += 1
        self.counters["output_tokens"] += len(sampled)
        outputs: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for request, _, _ in sampled.values():
            outputs[request.client_id].append(output_of(request, len(request.output_token_ids) - 1))
        for client_id, of_client in outputs.items():
            self._clients.tell_outputs(client_id, of_client)
        for request in finished:
            assert request.finish_reason is not None
            self._close(request, request.finish_reason, now)

    def _observe(self, flight: _Flight) -> None:
        """Lets the scheduler learn from the time that the step took: from its launch, or from the end of the one before."""
        ended_at = flight.ended_at or self._clock()
        started_at, self._step_end = max(flight.started_at, self._step_end), ended_at
        if self._tracer is not None and self._tracer.is_on:
            name = "decode" if flight.num_decodes == len(flight.scheduled) else "decode and prefill" if flight.num_decodes else "prefill"
            ids = (item.request.request_id for item in flight.scheduled)
            self._tracer.span(name, started_at, ids, sum(item.num_tokens for item in flight.scheduled), end=ended_at)
        if self.scheduler.step_times is not None:
            prefills = flight.scheduled[flight.num_decodes :]
            num_pairs = sum(item.num_tokens * (item.start + item.num_tokens // 2) for item in prefills)
            num_prefill = sum(item.num_tokens for item in prefills)
            self.scheduler.step_times.observe(flight.num_decodes, num_prefill, num_pairs, ended_at - started_at)

    def _send_step(self, message: StepsMessage) -> None:
        if self._publish_step is not None and not self._publish_step(message):
            raise PipelineError("a rank does not keep up with the steps")

    # How requests end.

    def _end(self, request: Request, outcome: Outcome, now: float) -> None:
        """Ends an open request from outside and tells its client."""
        self.scheduler.remove(request)
        ended = self._close(request, outcome, now)
        self._clients.tell_ended(request.request_id, ended, len(request.output_token_ids))

    def _close(self, request: Request, outcome: Outcome, now: float) -> Ended:
        self._drop(request)
        self._tell_preprocess(request.request_id, request.attempt)
        logger.debug("%s ended: %s", request.request_id, outcome)
        return self._clients.remember_request(request, outcome, now)

    def _forget(self, request: Request) -> None:
        """A higher attempt takes the place of this one: no terminal message."""
        self.scheduler.remove(request)
        self._drop(request)

    def _drop(self, request: Request) -> None:
        del self.requests[request.request_id]
        self._give_back(request.take_all_leases())

    def _give_back(self, leases: list[Lease]) -> None:
        """Releases leases as soon as no step under way can read what they hold."""
        if self._under_way:
            self._under_way[-1].leases += leases
        else:
            self._leases.release(leases)

    def _tell_preprocess(self, request_id: str, attempt: int) -> None:
        """The request has ended, or never began. Saying it again is harmless, not saying it would keep its credit for ever."""
        self._feedback.send(RequestEnded(request_id=request_id, attempt=attempt, **self._origin))

    # What time does.

    def tick(self, now: float) -> None:
        """Sends lease sets, ends the requests of clients that left or were cut off, forgets what is long over. Call it every second."""
        held = [chunk.lease for request in self.requests.values() for chunk in request.chunks if chunk.lease is not None]
        held += [lease for flight in self._under_way for lease in flight.leases]
        self._leases.send_sets(held, now)
        lost = self._clients.lost(now)
        for request in [request for request in self.requests.values() if request.client_id in lost]:
            self._end(request, Interruption("its client had left, or did not read"), now)  # if it comes back, it may go on
        self._clients.forget(now)
        self._leases.forget_early(now)

    def check_integrity(self) -> None:
        self.scheduler.check_integrity()
        assert len(self.scheduler.waiting) + len(self.scheduler.running) == len(self.requests), "a request is lost or held twice"
        if not self.requests:
            self.scheduler.cache.check_empty()


def _plan(item: Scheduled) -> SequencePlan:
    request, start, stop = item.request, item.start, item.stop
    num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
    return SequencePlan(
        slot=request.slot,
        token_ids=pack_int32(request.token_ids(start, stop)) if stop <= num_known else b"",
        positions=request.positions_of(start, stop).tobytes(),
        num_computed_tokens=start,
        block_table=pack_int32(request.block_table),
        embeddings=request.embedding_slices(start, stop),
        is_sampled=item.is_sampled,
    )
