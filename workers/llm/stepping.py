"""Rank 0's steps: a schedule becomes a plan for all ranks, a plan an in-flight step, and that yields tokens.

With overlap the next step is launched before the in-flight step is collected. Results of a request that ends
meanwhile are dropped; leases that the in-flight step may still read are released when it is over.

    launch(schedule) → collect() the step before → choose() → launch(schedule) → …

For requests whose tokens a matcher restricts, only the choice of token waits, not the forward: see
`sampling/matching.py`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec

from pipeline.process.metrics import Metrics
from pipeline.process.trace import Tracer
from pipeline.wire.base import Origin
from pipeline.wire.errors import ErrorInfo, PipelineError, RequestError
from pipeline.wire.handles import PoolInfo
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import FinishReason, SamplingParams, with_seed
from pipeline.wire.steps import SequenceStart, SequenceStep, StateSave, StepPlan, StepsMessage, TokenMasks
from workers.llm.chunk import Lease
from workers.llm.leases import Leases
from workers.llm.request import Request
from workers.llm.sampling.matching import mask_of
from workers.llm.scheduler import Admitted, Schedule, Scheduled, Scheduler
from workers.llm.step_result import StepResult
from workers.llm.step_stats import StepStats
from workers.llm.step_times import StepSeconds


class StepHandle(Protocol):
    has_run: bool  # the step had run when `launch` returned, as on the CPU

    def result(self) -> StepResult: ...


class Pools(Protocol):
    def open(self, info: PoolInfo) -> None: ...

    def close(self, pool_id: str) -> None: ...

    def knows(self, pool_id: str, epoch: int) -> bool: ...


class Runner(Protocol):
    @property
    def pools(self) -> Pools: ...

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def choose(self, masks: Sequence[bytes]) -> None: ...


@dataclass(slots=True)
class InFlightStep:
    scheduled: list[Scheduled]
    sampled: list[Request]  # the scheduled requests that get a token
    num_decodes: int  # the first ones of `scheduled`
    launched: StepHandle
    started_at: float
    ended_at: float | None  # None: still running when `launch` returned
    # To be released when the step is over: the step may still read them.
    leases: list[Lease] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """The monotonic clock (seconds), a tracer, the worker's metrics, and `record`, which takes the ids of the
    executing requests that have yielded no token."""

    clock: Callable[[], float] = time.monotonic
    tracer: Tracer | None = None
    metrics: Metrics = field(default_factory=Metrics)
    record: Callable[[Iterable[str]], None] | None = None


class Yielded(NamedTuple):
    """Output tokens of a request from `offset` on are new."""

    request: Request
    offset: int


class Collected(NamedTuple):
    yielded: list[Yielded]
    finished: list[Request]  # with their finish reason set and their blocks freed


class Stepper:
    """`publish_step` sends a message to the other ranks; None when there are none.

    `has_overlap`: a step is launched while the step before runs, which pays where the device computes
    asynchronously. `preparing` returns the requests whose matchers are being started.
    """

    def __init__(
        self,
        origin: Origin,
        scheduler: Scheduler,
        runner: Runner,
        leases: Leases,
        publish_step: Callable[[StepsMessage], bool] | None,
        has_overlap: bool,
        watch: Watch,
        preparing: Callable[[], Iterable[Request]] = tuple,
    ) -> None:
        self.scheduler, self.runner, self._preparing = scheduler, runner, preparing
        self._origin, self._leases, self._publish_step, self._watch = origin, leases, publish_step, watch
        self.has_overlap = has_overlap
        self.is_wide = False  # steps run on all cores
        self._stats = StepStats(watch.metrics)
        self.counters = self._stats.counters
        self._in_flight: deque[InFlightStep] = deque()
        self._started: list[SequenceStart] = []  # to go into the next plan
        self._decodes = [SequenceStep(slot) for slot in range(scheduler.max_num_seqs)]
        self._step, self._step_end = 0, 0.0
        self.last_step = StepSeconds(0, 0, 0.0)  # that has been collected
        self._unchosen: list[Scheduled] = []  # requests of the last launched step that wait for masks
        self._failed: list[tuple[Request, ErrorInfo]] = []
        self._executing: set[str] = set()  # as last recorded

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def leases_in_flight(self) -> list[Lease]:
        return [lease for step in self._in_flight for lease in step.leases]

    def give_back(self, leases: list[Lease]) -> None:
        """Releases leases as soon as no in-flight step can read their embeddings."""
        if self._in_flight:
            self._in_flight[-1].leases += leases
        else:
            self._leases.release(leases)

    def send(self, message: StepsMessage) -> None:
        """Sends a message to the other ranks, in the order of the steps."""
        if self._publish_step is not None and not self._publish_step(message):
            raise PipelineError("a rank does not keep up with the steps")

    # To the device.

    def start(self, admitted: Admitted) -> None:
        """A request runs from now on: the next plan brings all of its state that its steps do not repeat."""
        request = admitted.request
        request.num_sent_blocks = len(request.block_table)
        self._started.append(_start_of(*admitted))

    def launch(self, schedule: Schedule) -> None:
        plan = self._plan([self._step_of(item) for item in schedule.scheduled])
        self.send(plan)
        self._record(schedule.scheduled)
        sampled = [item.request for item in schedule.scheduled if item.is_sampled]
        self._unchosen = [item for item in schedule.scheduled if item.is_sampled and item.request.matchers]
        started_at = self._watch.clock()
        launched = self.runner.launch(plan)
        ended_at = self._watch.clock() if launched.has_run else None
        num_decodes = schedule.num_decodes
        step = InFlightStep(schedule.scheduled, sampled, num_decodes, launched, started_at, ended_at)
        self._in_flight.append(step)

    def choose(self) -> None:
        """Chooses the tokens that `launch` left open.

        All earlier steps must have been collected, so that the matchers have seen their tokens.
        """
        if not self._unchosen:
            return
        assert self.num_in_flight == 1
        masks = [mask for item in self._unchosen for mask in self._masks_of(item)]
        self._unchosen = []
        self.send(TokenMasks(step=self._step, masks=tuple(masks), **self._origin))
        self.runner.choose(masks)

    def _masks_of(self, item: Scheduled) -> Sequence[bytes]:
        """Of its next token and of those behind its drafts. Empty for a request that has ended, or whose
        matcher fails: its tokens are dropped."""
        request = item.request
        try:
            if not request.is_over:
                return mask_of(request.matchers), *request.draft_masks[: len(item.drafts)]
        except RequestError as error:
            self._failed.append((request, error.info))
        return (b"",) * (1 + len(item.drafts))

    def take_failed(self) -> list[tuple[Request, ErrorInfo]]:
        """The requests that a matcher has ended since the last call, and why."""
        failed, self._failed = self._failed, []
        return failed

    def execute(self, start: SequenceStart, step: SequenceStep) -> float:
        """Runs a step that belongs to no request, on all ranks; returns the seconds it took."""
        seconds = 0.0
        for plan in (self._plan([], [start]), self._plan([step])):
            self.send(plan)
            started_at = self._watch.clock()
            self.runner.launch(plan).result()
            seconds = self._watch.clock() - started_at
        return seconds

    def _plan(self, sequences: Sequence[SequenceStep], others: Sequence[SequenceStart] = ()) -> StepPlan:
        """A plan with the next step number. `others` are sequences to start that belong to no request."""
        self._step += 1
        started = (*self._started, *others)
        self._started.clear()
        return StepPlan(
            step=self._step,
            started=started,
            sequences=tuple(sequences),
            is_wide=self.is_wide,
            **self._origin,
        )

    def _step_of(self, item: Scheduled) -> SequenceStep:
        request, table = item.request, item.request.block_table
        new_blocks = b""
        if len(table) > request.num_sent_blocks:
            new_blocks = pack_int32(table[request.num_sent_blocks :])
            request.num_sent_blocks = len(table)
        elif item.is_plain_decode:
            return self._decodes[request.slot]
        embeddings, drafts = request.embedding_slices(item.start, item.stop), pack_int32(item.drafts)
        saves = tuple(StateSave(save.position - item.start, save.place) for save in item.saves)
        return SequenceStep(
            request.slot, item.num_tokens, item.is_sampled, new_blocks, embeddings, drafts, saves,
            item.num_guesses,
        )  # fmt: skip

    def record(self) -> None:
        """Records the ids of executing requests without a token, if they have changed."""
        self._record(())

    def _record(self, scheduled: Sequence[Scheduled]) -> None:
        if self._watch.record is None:
            return
        executing: set[str] = set()
        executing.update(request.request_id for request in self._preparing())
        for items in (scheduled, *(step.scheduled for step in self._in_flight)):
            executing.update(item.request.request_id for item in items if not item.request.has_progress)
        if executing != self._executing:
            self._executing = executing
            self._watch.record(executing)

    # From the device.

    def collect(self) -> Collected:
        """Takes the results of the oldest in-flight step."""
        step = self._in_flight.popleft()
        result = step.launched.result()
        self._observe(step)
        yielded: list[Yielded] = []
        new_token_ids: dict[tuple[str, int], Sequence[int]] = {}
        for request, token_ids, logprobs in zip(step.sampled, result.token_ids, result.logprobs, strict=True):
            if not request.is_over:
                yielded.append(Yielded(request, len(request.output_token_ids)))
                new_token_ids[request.key] = token_ids
                request.logprobs.extend(logprobs)
        for item in step.scheduled:
            # An ended request has released its leases already; a preempted one reads its embeddings again.
            request = item.request
            is_in_prompt = item.start < len(request.prompt_token_ids)
            if is_in_prompt and not request.is_over and request.num_computed_tokens >= item.stop:
                step.leases += request.take_read_leases(item.stop)
        for sequence, scores in result.prompt_scores.items():
            step.scheduled[sequence].request.take_prompt_scores(scores)
        self._leases.release(step.leases)
        guesses = {step.sampled[place].key: guessed for place, guessed in result.guesses.items()}
        finished = self.scheduler.update(step.scheduled, new_token_ids, guesses)
        for request, _ in yielded:
            if request.matchers and not request.is_over and self._is_ended(request, new_token_ids):
                request.finish_reason = FinishReason.STOP
                self.scheduler.remove(request)
                finished.append(request)
        for request in finished:
            del request.logprobs[len(request.output_token_ids) :]  # of tokens after the last one
        self.counters["steps"] += 1
        self.counters["generation_tokens"] += sum(
            len(one.output_token_ids) - offset for one, offset in yielded
        )
        return Collected(yielded, finished)

    def _is_ended(self, request: Request, new_token_ids: Mapping[tuple[str, int], Sequence[int]]) -> bool:
        """Its matchers take its new tokens. Whether one allows no more."""
        try:
            for matcher in request.matchers:
                matcher.accept(new_token_ids[request.key])
            return any(matcher.is_over for matcher in request.matchers)
        except RequestError as error:
            self._failed.append((request, error.info))
            return False

    def _observe(self, step: InFlightStep) -> None:
        """Reports how long the step took, from its launch or, if later, the end of the step before."""
        ended_at = step.ended_at or self._watch.clock()
        started_at, self._step_end = max(step.started_at, self._step_end), ended_at
        tracer, step_times = self._watch.tracer, self.scheduler.budget.step_times
        if tracer is not None and tracer.is_on:
            prefill = "decode and prefill" if step.num_decodes else "prefill"
            name = "decode" if step.num_decodes == len(step.scheduled) else prefill
            ids = (item.request.request_id for item in step.scheduled)
            tracer.step(name, started_at, ids, sum(item.num_tokens for item in step.scheduled), ended_at)
        decodes, prefills = step.scheduled[: step.num_decodes], step.scheduled[step.num_decodes :]
        num_decodes = sum(item.num_tokens for item in decodes)  # a draft counts as a decode
        num_prefill = sum(item.num_tokens for item in prefills)
        self._stats.on_step(num_decodes + num_prefill, ended_at - started_at)
        self.last_step = StepSeconds(len(decodes), num_decodes, ended_at - started_at)
        if step_times is not None:
            num_pairs = sum(item.num_tokens * (item.start + item.num_tokens // 2) for item in prefills)
            step_times.observe(num_decodes, num_prefill, num_pairs, ended_at - started_at)


def _start_of(request: Request, num_cached_tokens: int, snapshot: int) -> SequenceStart:
    sampling = with_seed(request.sampling, request.request_id, request.index)
    if sampling.prompt_logprobs is not None and not request.wants_prompt_logprobs:
        sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
    return SequenceStart(
        slot=request.slot,
        num_prompt_tokens=len(request.prompt_token_ids),
        sampling=_without_grammar(sampling),
        token_ids=pack_int32([*request.prompt_token_ids, *request.output_token_ids]),
        positions=request.positions.tobytes() if request.items else b"",
        position_delta=request.position_delta,
        num_computed_tokens=num_cached_tokens,
        block_table=pack_int32(request.block_table),
        is_masked=bool(request.matchers),
        snapshot=snapshot,
        adapter=request.adapter.number,
    )


def _without_grammar(sampling: SamplingParams) -> SamplingParams:
    """Ranks need masks only."""
    return sampling if sampling.grammar is None else msgspec.structs.replace(sampling, grammar=None)
