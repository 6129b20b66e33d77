"""The requests that are open at rank 0, and how they end: only here a terminal message is sent."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable

from pipeline.transport.ends import Sink
from pipeline.wire.messages import FeedbackMessage, ItemNotNeeded, Origin, RequestEnded, RequestOutput
from workers.llm.clients import Clients, Ended, Interruption, Outcome, output_of
from workers.llm.leases import Leases
from workers.llm.request import Request
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
    ) -> None:
        self._origin, self._scheduler, self._stepper = origin, scheduler, stepper
        self._clients, self._leases, self._feedback = clients, leases, feedback
        self._on_first_token = on_first_token
        self.open: dict[str, Request] = {}
        self.counters = {"prompt_tokens": 0, "cached_tokens": 0, "interrupted": 0}

    def add(self, request: Request) -> None:
        self.open[request.request_id] = request
        self._scheduler.add(request)

    # While they run.

    def on_admitted(self, admitted: Admitted) -> None:
        """What the prefix cache covers is not needed; of the rest, what was read before a preemption is."""
        request, covered = admitted
        self.counters["cached_tokens"] += covered
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
        """Tells clients their new tokens; closes what has finished."""
        self._tell(collected.yielded)
        for request in collected.finished:
            assert request.finish_reason is not None
            self._close(request, request.finish_reason, now)

    def _tell(self, yielded: Iterable[Yielded]) -> None:
        outputs: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for request, offset in yielded:
            if offset == request.num_earlier_tokens:
                self._on_first_token(request.request_id)
            outputs[request.client_id].append(output_of(request, offset))
        for client_id, of_client in outputs.items():
            self._clients.tell_outputs(client_id, of_client)

    # How they end.

    def end(self, request: Request, outcome: Outcome, now: float) -> None:
        """Ends an open request from outside and tells its client."""
        self._scheduler.remove(request)
        ended = self._close(request, outcome, now)
        self._clients.tell_ended(request.request_id, ended, len(request.output_token_ids))

    def interrupt(self, request: Request, interruption: Interruption, now: float) -> None:
        """Something that the request needs was lost."""
        self.counters["interrupted"] += 1
        self.end(request, interruption, now)

    def forget(self, request: Request) -> None:
        """A higher attempt takes the place of this one: no terminal message."""
        self._scheduler.remove(request)
        self._drop(request)

    def tell_preprocess(self, request_id: str, attempt: int, outcome: Outcome | None = None) -> None:
        """The request has ended, or never began.

        Saying it again is harmless, not saying it would keep its credit for ever.
        """
        ended = RequestEnded(
            request_id=request_id, attempt=attempt, is_interrupted=isinstance(outcome, Interruption),
            **self._origin,
        )  # fmt: skip
        self._feedback.send(ended)

    def _close(self, request: Request, outcome: Outcome, now: float) -> Ended:
        self._drop(request)
        self.tell_preprocess(request.request_id, request.attempt, outcome)
        logger.debug("%s ended: %s", request.request_id, outcome)
        return self._clients.remember_request(request, outcome, now)

    def _drop(self, request: Request) -> None:
        del self.open[request.request_id]
        self._stepper.give_back(request.take_all_leases())
