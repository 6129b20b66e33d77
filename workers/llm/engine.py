"""Rank 0 without its process: messages in, steps, messages out.

    handle(message) … → step() → handle(message) … → step() → …

`intake.py` handles messages, `stepping.py` computes, `requests.py` ends requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.adapters import Adapter
from pipeline.transport.ends import Sink, Subscription
from pipeline.wire.base import Order, Origin
from pipeline.wire.carrying import CarryMessage
from pipeline.wire.clients import Welcome
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import EncodeMessage, FeedbackMessage
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.generation import EmbeddingReady, LlmMessage
from pipeline.wire.steps import SequenceStart, SequenceStep, StepsMessage
from pipeline.wire.topology import Role, WorkerId
from workers.llm.choices import Choices
from workers.llm.clients import Clients, Interruption, Publish
from workers.llm.intake import Intake
from workers.llm.leases import Leases
from workers.llm.matcher_starts import MatcherStarts
from workers.llm.request import AdapterKey, Request
from workers.llm.request_stats import RequestStats
from workers.llm.requests import Requests
from workers.llm.scheduler import Scheduler
from workers.llm.stepping import Runner, Stepper, Watch


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The sinks to rank 0's neighbours: clients, preprocess, ViTs by index, the carrier of this node and
    other ranks if there are any; and `on_first_token`, called with a request's id at its first new token."""

    publish: Publish
    feedback: Sink[FeedbackMessage]
    vits: Sequence[Sink[EncodeMessage]]
    carrier: tuple[WorkerId, Sink[CarryMessage]] | None = None
    publish_step: Callable[[StepsMessage], bool] | None = None
    on_first_token: Callable[[str], None] = lambda request_id: None


class Engine:
    """`epochs` are the current epochs of the workers, `adapters` those of the runner, by number. For
    `has_overlap` see `Stepper`."""

    def __init__(
        self,
        origin: Origin,
        scheduler: Scheduler,
        runner: Runner,
        welcome: Welcome,
        links: Links,
        epochs: Mapping[WorkerId, int] | None = None,
        has_overlap: bool = False,
        watch: Watch | None = None,
        matcher_starts: MatcherStarts | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._matcher_starts = matcher_starts or MatcherStarts(())
        self._clients = Clients(origin, welcome, links.publish)
        self._leases = Leases(origin, links.vits, links.carrier)
        watch = watch or Watch()
        self.stepper = Stepper(
            origin,
            scheduler,
            runner,
            self._leases,
            links.publish_step,
            has_overlap,
            watch,
            lambda: self._matcher_starts.waiting,
        )
        self._requests = Requests(
            origin,
            scheduler,
            self.stepper,
            self._clients,
            self._leases,
            links.feedback,
            links.on_first_token,
            RequestStats(watch.metrics, welcome.max_model_len, watch.clock),
            watch.tracer,
        )
        self._has_awaited_news = False  # a carrier has brought an embedding
        self.intake = Intake(
            origin,
            self._requests,
            self.stepper,
            self._clients,
            self._leases,
            welcome,
            {} if epochs is None else epochs,
            self._matcher_starts,
            {one.name: AdapterKey(number, one.digest) for number, one in enumerate(adapters)},
        )

    @property
    def requests(self) -> Mapping[str, Choices]:
        """The open requests."""
        return self._requests.open

    @property
    def has_work(self) -> bool:
        """Whether `step` may have something to compute."""
        return bool(self.requests) or self.stepper.num_in_flight > 0

    @property
    def num_clients_cut_off(self) -> int:
        return self._clients.num_cut_off

    @property
    def counters(self) -> dict[str, int]:
        return {**self.stepper.counters, **self.intake.counters, **self._requests.stats.counters}

    def handle(self, message: LlmMessage, now: float, frames: Sequence[memoryview] = ()) -> None:
        self.intake.handle(message, now, frames)
        if isinstance(message, EmbeddingReady) and message.sender.role is Role.CARRIER:
            self._has_awaited_news = True

    def on_subscriptions(self, events: Iterable[Subscription], now: float) -> None:
        self._clients.on_subscriptions(events, now)

    def on_death(self, successor: WorkerState, now: float) -> None:
        """A neighbour has died, and has a successor."""
        if successor.worker.role in (Role.VIT, Role.CARRIER):
            self._collect_down_to(0, now)  # an in-flight step may read the dead worker's pool
        self.intake.on_death(successor, now)

    def step(self, now: float) -> bool:
        """Launches the next step and sends the results of the step before (without overlap, of this step).

        Returns False when there is nothing to do.
        """
        if self._has_awaited_news:
            self._tell_awaited()
        is_preparing = self._take_matchers(now)
        schedule = self.scheduler.schedule()
        for request in schedule.preempted:
            self._requests.on_preempted(request)
        for admitted in schedule.admitted:
            self._requests.on_admitted(admitted)
        if schedule.is_alone:
            self._collect_down_to(0, now)
        if schedule.scheduled:
            self.stepper.launch(schedule)
        has_work = self.stepper.num_in_flight > 0
        self._collect_down_to(1 if schedule.scheduled else 0, now)
        self.stepper.choose()
        self._fail(self.stepper.take_failed(), now)
        if schedule.is_alone or not self.stepper.has_overlap:
            self._collect_down_to(0, now)
            self._fail(self.stepper.take_failed(), now)
        if has_work or is_preparing:
            self.stepper.record()
        return has_work

    def _take_matchers(self, now: float) -> bool:
        """Lets requests go on whose matchers have started. Whether any were being started."""
        if not self._matcher_starts.waiting:
            return False
        self._fail(self._matcher_starts.take_done(), now)
        return True

    def _fail(self, failed: Sequence[tuple[Request, ErrorInfo]], now: float) -> None:
        for request, error in failed:
            choices = self.requests.get(request.request_id)
            if choices is not None and request in choices.all and not request.is_over:
                self._requests.fail(choices, error, now)

    def _collect_down_to(self, num_in_flight: int, now: float) -> None:
        while self.stepper.num_in_flight > num_in_flight:
            self._requests.on_collected(self.stepper.collect(), now)

    def execute(self, start: SequenceStart, step: SequenceStep) -> float:
        """Runs a step that belongs to no request, on all ranks; returns the seconds it took."""
        return self.stepper.execute(start, step)

    def tick(self, now: float) -> None:
        """To be called every second.

        Sends lease sets, ends the requests of clients that left or were cut off, forgets old entries.
        """
        chunks = (chunk for choices in self.requests.values() for one in choices.all for chunk in one.chunks)
        held = [chunk.lease for chunk in chunks if chunk.lease]
        self._leases.send_sets([*held, *self.stepper.leases_in_flight], now)
        self._tell_awaited()
        lost = self._clients.lost(now)
        for choices in [choices for choices in self.requests.values() if choices.client_id in lost]:
            # An interruption, no error: if the client comes back, it resubmits the request.
            self._requests.fail(choices, Interruption("its client had left, or did not read"), now)
        self._clients.forget(now)
        self._leases.forget_early(now)

    def _tell_awaited(self) -> None:
        """Tells this node's carrier which of the embeddings from other nodes is needed first."""
        self._has_awaited_news = False
        if not self._leases.has_carrier:
            return
        oldest = min(
            (
                Order(request.arrival, position)
                for choices in self.requests.values()
                for request in choices.open
                for position, chunk in enumerate(request.chunks)
                if chunk.is_awaited and chunk.wire.carriers
            ),
            default=None,
        )
        self._leases.tell_awaited(oldest)

    def check_integrity(self) -> None:
        scheduler = self.scheduler
        scheduler.check_integrity()
        num_scheduled = len(scheduler.waiting) + len(scheduler.running)
        num_open = sum(len(choices.open) for choices in self.requests.values())
        assert num_scheduled == num_open, "a choice is lost or held twice"
        if not self.has_work:  # a step in flight may save states for a request that has ended
            scheduler.cache.check_empty()
