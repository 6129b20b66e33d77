"""A group of LLM ranks: its steps are those of the server's `Scheduler`, their times are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.wire.handles import TensorHandle
from tools.simulation.clock import Busy, Clock
from tools.simulation.stages import StageTimes
from tools.simulation.turns import Turns
from workers.llm.cache.manager import CacheManager
from workers.llm.chunk import Chunk, Lease
from workers.llm.lending import Lending
from workers.llm.request import Request
from workers.llm.scheduler import Schedule, Scheduler
from workers.llm.step_times import Measured, StepSeconds, StepTimes

MEASURED_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FAR_BEYOND = 4.0  # as the server measures: larger steps are extrapolated
TOKEN = 7  # that every step yields


class Limits(NamedTuple):
    max_num_seqs: int
    max_num_batched_tokens: int
    max_itl_stretch: float  # 0: none
    prefix_caching: bool


class Group:
    """`on_token` is called with each request that a step gives a token, `on_finished` with each that it ends,
    `on_lost` with a chunk of a preempted request, `on_covered` with one that the prefix cache has,
    `release` with leases."""

    def __init__(
        self, clock: Clock, lead: int, stages: StageTimes, limits: Limits, turns: Turns, busy: Busy,
        on_token: Callable[[Request], None], on_finished: Callable[[Request], None],
        on_lost: Callable[[Request, Chunk], None], on_covered: Callable[[Request, Chunk], None],
        release: Callable[[Sequence[Lease]], None],
    ) -> None:  # fmt: skip
        self._clock, self.lead, self._stages, self._turns, self._busy = clock, lead, stages, turns, busy
        self._on_token, self._on_finished, self._release = on_token, on_finished, release
        self._on_lost, self._on_covered = on_lost, on_covered
        cache = CacheManager.of_size(stages.kv_blocks, stages.block_size, limits.max_num_seqs)
        step_times = _step_times(stages, limits) if limits.max_itl_stretch else None
        self.scheduler = Scheduler(
            cache, limits.max_num_batched_tokens, (), step_times, has_prefix_cache=limits.prefix_caching
        )
        self._lending = Lending()
        self._is_computing = False
        self.requests: dict[str, Request] = {}

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.scheduler.add(request)
        self.wake()

    def on_embeddings(self, request_id: str, item: int, lease: Lease) -> None:
        request = self.requests.get(request_id)
        chunk = request.chunks[item] if request is not None else None
        if chunk is None or chunk.embeddings is not None or chunk.is_read:
            self._release([lease])
            return
        chunk.embeddings = TensorHandle(str(lease.owner), 1, 0, 1, 0, (chunk.wire.num_tokens, 1), "bfloat16")
        chunk.lease = lease
        self.wake()

    def wake(self) -> None:
        if not self._is_computing:
            self._step()

    def _step(self) -> None:
        schedule = self.scheduler.schedule()
        # Set first: what follows may bring messages, which wake the group.
        self._is_computing = bool(schedule.scheduled)
        for request in schedule.preempted:
            leases = request.take_all_leases()
            self._release(leases)
            for chunk in request.chunks:
                if chunk.is_lost:
                    self._on_lost(request, chunk)
        for request, num_cached, _ in schedule.admitted:
            covered = [chunk for chunk in request.chunks if chunk.stop <= num_cached and not chunk.is_read]
            self._release(request.take_read_leases(num_cached))
            for chunk in covered:
                self._on_covered(request, chunk)
        if not schedule.scheduled:
            self._turns.idle()
            return
        self._turns.begin()
        self._run(schedule)

    def _run(self, schedule: Schedule) -> None:
        decodes, prefills = (
            schedule.scheduled[: schedule.num_decodes], schedule.scheduled[schedule.num_decodes :],
        )  # fmt: skip
        num_prefill = sum(item.num_tokens for item in prefills)
        num_pairs = sum(item.num_tokens * (item.start + item.num_tokens // 2) for item in prefills)
        num_context = sum(item.stop for item in decodes)
        seconds = self._stages.step_seconds(len(decodes), num_context, num_prefill, num_pairs)
        step = StepSeconds(len(decodes), len(decodes), seconds)
        start = self._clock.now

        def done() -> None:
            self._busy.add(self.lead, start, self._clock.now)
            if (times := self.scheduler.budget.step_times) is not None:
                times.observe(len(decodes), num_prefill, num_pairs, seconds)
            self._collect(schedule)
            self._go_on(step)

        self._clock.after(seconds, done)

    def _collect(self, schedule: Schedule) -> None:
        sampled = [item.request for item in schedule.scheduled if item.is_sampled]
        read: list[Lease] = []
        for item in schedule.scheduled:
            if item.start < len(item.request.prompt_token_ids):
                read += item.request.take_read_leases(item.stop)
        finished = self.scheduler.update(schedule.scheduled, {one.key: [TOKEN] for one in sampled})
        self._release(read)
        for request in sampled:
            self._on_token(request)
        for request in finished:
            del self.requests[request.request_id]
            self._on_finished(request)

    def _go_on(self, step: StepSeconds) -> None:
        budget = self.scheduler.budget
        budget.is_prefill_deferred, budget.stretch = False, None
        if self._turns.are_taken:
            self._lending.observe(step, self.scheduler.num_pictures_unanswered)
            loan = self._lending.behind(step, budget.step_times, budget.has_prefill, self._turns.is_awaited)
            budget.is_prefill_deferred, budget.stretch = loan.defers_prefill, loan.stretch
            if loan.seconds > 0 and self._turns.is_awaited:
                self._turns.lend(loan.seconds, self._step)
                return
        self._clock.after(self._stages.between_s, self._step)


def _step_times(stages: StageTimes, limits: Limits) -> StepTimes:
    """As the server measures them at its start."""
    measured: list[Measured] = []
    for size in MEASURED_SIZES:
        if size > limits.max_num_batched_tokens:
            break
        measured.append(Measured(size, stages.step_seconds(0, 0, size, size * size // 2)))
        if measured[-1].seconds > FAR_BEYOND * measured[0].seconds:
            break
    probe = measured[len(measured) // 2].num_tokens
    with_history, without = (stages.step_seconds(0, 0, probe, probe * before) for before in (1024, 0))
    return StepTimes(measured, (with_history - without) / (probe * 1024), limits.max_itl_stretch)
