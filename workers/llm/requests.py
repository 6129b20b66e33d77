"""The open requests at rank 0, and their end: the terminal message of an open request is sent only here."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from pipeline.process.trace import Tracer
from pipeline.transport.ends import Sink
from pipeline.wire.base import Origin
from pipeline.wire.clients import RequestOutput
from pipeline.wire.encoding import FeedbackMessage, ItemNotNeeded, PromptComputed, RequestEnded
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.sampling import FinishReason
from workers.llm.choices import Choices
from workers.llm.clients import Clients, Ended, Failure, Interruption, output_of
from workers.llm.leases import Leases
from workers.llm.request import Request
from workers.llm.request_stats import RequestStats
from workers.llm.scheduler import Admitted, Scheduler
from workers.llm.stepping import Collected, Stepper, Yielded

logger = logging.getLogger(__name__)


class Requests:
    def __init__(
        self,
        origin: Origin,
        scheduler: Scheduler,
        stepper: Stepper,
        clients: Clients,
        leases: Leases,
        feedback: Sink[FeedbackMessage],
        on_first_token: Callable[[str], None],
        stats: RequestStats,
        tracer: Tracer | None = None,
    ) -> None:
        self._origin, self._scheduler, self._stepper = origin, scheduler, stepper
        self._clients, self._leases, self._feedback = clients, leases, feedback
        self._on_first_token, self._tracer, self.stats = on_first_token, tracer, stats
        self._spans = None if tracer is None else tracer.requests
        self.open: dict[str, Choices] = {}

    def add(self, choices: Choices) -> None:
        self.open[choices.request_id] = choices
        if self._tracer is not None and self._spans is not None:
            self._tracer.follow(choices.request_id, choices.attempt, choices.trace)
            self._spans.enter(choices.request_id, "queue")
        choices.keep_chunks_behind(self._scheduler.prefixes.num_shared_tokens(choices.all))
        for request in choices.all:
            self.stats.on_added(request)
            self._scheduler.add(request)

    def known(self, request_id: str) -> Choices | Ended | None:
        """The open request of this id, else what is remembered of an ended one."""
        return self.open.get(request_id) or self._clients.ended(request_id)

    # While requests run.

    def on_admitted(self, admitted: Admitted) -> None:
        """Drops embeddings that the prefix cache covers, and requests those again that a preemption lost."""
        request, covered = admitted.request, admitted.num_cached_tokens
        if self._spans is not None:
            self._spans.enter(request.request_id, "prefill", behind="queue")
        self.stats.on_admitted(request)
        missing = {chunk.item for chunk in request.chunks if chunk.embeddings is None and not chunk.is_lost}
        for number, item in enumerate(request.items):
            if number in missing and item.stop <= covered:
                self._feedback.send(
                    ItemNotNeeded(
                        request_id=request.request_id,
                        attempt=request.attempt,
                        item=number,
                        **self._origin,
                    )
                )
        self._leases.release(request.take_read_leases(covered))
        for chunk in request.chunks:
            if chunk.is_lost and not chunk.is_read and chunk.embeddings is None:
                self._leases.request_again(request, chunk)
            chunk.is_lost = False
        self._stepper.start(admitted)

    def on_preempted(self, request: Request) -> None:
        logger.debug("%s is preempted", request.request_id)
        self._stepper.give_back(request.take_all_leases())

    def on_collected(self, collected: Collected, now: float) -> None:
        """Sends the new tokens to the clients, and closes finished requests."""
        self._tell(collected.yielded)
        ended = {request.request_id: self._end_choice(request) for request in collected.finished}
        for choices in ended.values():
            self._close_if_over(choices, now)

    def _tell(self, yielded: Iterable[Yielded]) -> None:
        outputs: dict[bytes, list[RequestOutput]] = defaultdict(list)
        now = self.stats.now
        for request, offset in yielded:
            self.stats.on_tokens(request, now)
            if offset == request.num_earlier_tokens:
                for lease, num_holders in self.open[request.request_id].on_first_token(request):
                    self._leases.share(lease, num_holders)
                    self._stepper.give_back([lease])
                self._on_first_token(request.request_id)
                self._tell_computed(request)
                if self._spans is not None:
                    told = {
                        "gen_ai.usage.input_tokens": len(request.prompt_token_ids),
                        "gen_ai.usage.cache_read.input_tokens": request.num_cached_tokens,
                    }
                    self._spans.enter(request.request_id, "decode", behind="prefill", attributes=told)
            outputs[request.client_id].append(output_of(request, offset))
        for client_id, of_client in outputs.items():
            self._clients.tell_outputs(client_id, of_client)

    def _tell_computed(self, request: Request) -> None:
        """Of a request with several choices each says so."""
        computed = PromptComputed(
            client_id=request.client_id, request_id=request.request_id, attempt=request.attempt,
            **self._origin,
        )  # fmt: skip
        self._feedback.send(computed)

    # How requests end.

    def _end_choice(self, request: Request) -> Choices:
        """Called when the choice has its finish reason and has left the scheduler."""
        self.stats.on_ended(request)
        choices = self.open[request.request_id]
        choices.hand_on(request)
        self._stepper.give_back(request.take_all_leases())
        return choices

    def _close_if_over(self, choices: Choices, now: float) -> None:
        """A request ends with its last choice."""
        if choices.leader is None:
            self.stats.on_all_ended(choices.all)
            self._close(choices, None, now)

    def abort_choice(self, request: Request, now: float) -> None:
        """The client aborts one choice."""
        self._scheduler.remove(request)
        request.finish_reason = FinishReason.ABORT
        self._clients.tell_outputs(request.client_id, [output_of(request, len(request.output_token_ids))])
        self._close_if_over(self._end_choice(request), now)

    def abort(self, choices: Choices, now: float) -> None:
        """Aborts all open choices of a request, and tells its client."""
        for request in choices.open:
            request.finish_reason = FinishReason.ABORT
            self.stats.on_ended(request)
        self._end(choices, None, now)

    def fail(self, choices: Choices, failure: Failure, now: float) -> None:
        """Ends an open request with an error or an interruption, and tells its client."""
        if isinstance(failure, ErrorInfo):  # an interrupted request goes on in its next attempt
            self.stats.on_failed()
        self._end(choices, failure, now)

    def _end(self, choices: Choices, failure: Failure | None, now: float) -> None:
        self._remove(choices)
        ended = self._close(choices, failure, now)
        self._clients.tell_ended(choices.request_id, ended)

    def interrupt(self, choices: Choices, interruption: Interruption, now: float) -> None:
        """Ends a request that has lost something it needs; its client resubmits it."""
        self.stats.counters["interrupted"] += 1
        self.fail(choices, interruption, now)

    def forget(self, choices: Choices) -> None:
        """A higher attempt replaces this one, so no terminal message is sent."""
        self._remove(choices)
        self._drop(choices, "replaced by a later attempt")

    def tell_preprocess(
        self, client_id: bytes, request_id: str, attempt: int, failure: Failure | None = None
    ) -> None:
        """Tells preprocess that the request has ended or never began.

        A repeated message is harmless; without any, preprocess would keep the request's credit for ever.
        """
        ended = RequestEnded(
            client_id=client_id, request_id=request_id, attempt=attempt,
            is_interrupted=isinstance(failure, Interruption), **self._origin,
        )  # fmt: skip
        self._feedback.send(ended)

    def _remove(self, choices: Choices) -> None:
        for request in choices.open:
            self._scheduler.remove(request)

    def _close(self, choices: Choices, failure: Failure | None, now: float) -> Ended:
        reasons = ", ".join(str(request.finish_reason) for request in choices.all)
        self._drop(choices, _outcome(failure) or reasons)
        self.tell_preprocess(choices.client_id, choices.request_id, choices.attempt, failure)
        logger.debug("%s ended: %s", choices.request_id, failure or reasons)
        return self._clients.remember_choices(choices, failure, now)

    def _drop(self, choices: Choices, outcome: str) -> None:
        del self.open[choices.request_id]
        if self._spans is not None:
            num_tokens = sum(len(one.output_token_ids) - one.num_earlier_tokens for one in choices.all)
            told: dict[str, int | str] = {"gen_ai.usage.output_tokens": num_tokens, "vlm.outcome": outcome}
            self._spans.end(choices.request_id, told)
        for request in choices.all:
            self._stepper.give_back(request.take_all_leases())


def _outcome(failure: Failure | None) -> str:
    """Empty for a request that has ended in order. Never a message: that may echo the client's input."""
    match failure:
        case None:
            return ""
        case Interruption(reason=reason):
            return f"interrupted: {reason}"
        case _:
            return f"failed: {failure.status}"
