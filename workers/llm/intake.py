"""Handles what arrives at rank 0: new requests, queries, aborts, embeddings, the death of neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import assert_never

from pipeline.process.flight_recorder import digest_of
from pipeline.wire.base import Origin, PoolClosed, PoolOpened, WorkerMessage
from pipeline.wire.clients import PROTOCOL_VERSION, AbortRequest, Hello, Preparing, QueryRequest, Welcome
from pipeline.wire.control import WorkerState
from pipeline.wire.errors import ErrorInfo, context_overflow
from pipeline.wire.generation import (
    EmbeddingReady,
    EncodeFailed,
    GenerateRequest,
    LeaseRefused,
    LlmMessage,
    RequestNotYours,
    RequestRefused,
)
from pipeline.wire.sampling import FinishReason
from pipeline.wire.topology import Role, WorkerId
from workers.llm.arriving_embeddings import ArrivingEmbeddings
from workers.llm.choices import Choices
from workers.llm.clients import Clients, Ended, Failure, Interruption, aborted_output, output_of
from workers.llm.leases import Leases
from workers.llm.matcher_starts import MatcherStarts
from workers.llm.request import WITHOUT_ADAPTER, AdapterKey, Request
from workers.llm.requests import Requests
from workers.llm.stepping import Stepper


class Intake:
    """`epochs` are the current epochs of the workers, `adapters` those that requests may name."""

    def __init__(
        self,
        origin: Origin,
        requests: Requests,
        stepper: Stepper,
        clients: Clients,
        leases: Leases,
        welcome: Welcome,
        epochs: Mapping[WorkerId, int],
        matcher_starts: MatcherStarts,
        adapters: Mapping[str, AdapterKey] = MappingProxyType({}),
    ) -> None:
        self._origin, self._requests, self._stepper = origin, requests, stepper
        self._clients, self._leases, self._welcome = clients, leases, welcome
        self._pools = stepper.runner.pools
        self._embeddings = ArrivingEmbeddings(requests, clients, leases, self._pools)
        self.epochs, self._matcher_starts = epochs, matcher_starts
        self._adapters = {"": WITHOUT_ADAPTER, **adapters}
        self.counters = {"stale_messages": 0}

    def handle(self, message: LlmMessage, now: float, frames: Sequence[memoryview] = ()) -> None:
        if isinstance(message, WorkerMessage) and message.epoch < self.epochs.get(message.sender, 0):
            self.counters["stale_messages"] += 1
            return
        match message:
            case Hello():
                self._clients.greet(message.client_id, message.protocol)
            case GenerateRequest():
                self._on_generate(message, now, frames)
            case QueryRequest():
                self._on_query(message, now)
            case AbortRequest():
                self._on_abort(message, now)
            case RequestRefused():
                self._on_refused(message, now)
            case RequestNotYours():
                self._on_not_yours(message, now)
            case Preparing():
                self._clients.tell_preparing(message)
            case PoolOpened():
                self._stepper.send(message)  # first: opening a pool is a collective of all ranks
                self._pools.open(message.pool)
                for embedding in self._leases.take_unmapped():
                    self._embeddings.on_ready(embedding, now)
            case EmbeddingReady():
                self._embeddings.on_ready(message, now)
            case EncodeFailed():
                self._embeddings.on_failed(message, now)
            case LeaseRefused():
                self._embeddings.on_refused(message, now)
            case _:
                assert_never(message)

    def on_death(self, successor: WorkerState, now: float) -> None:
        """A neighbour has died. No in-flight step may read embeddings in its pool.

        Requests that still need something of the dead worker are interrupted, and resubmitted by their
        clients. Embeddings that have been read are no longer needed.
        """
        worker, role = successor.worker, successor.worker.role
        open_requests = list(self._requests.open.values())
        if role in (Role.VIT, Role.CARRIER):
            self._leases.forget_owner(worker, successor.epoch)
            hit = [choices for choices in open_requests if choices.forget_source(worker, successor.epoch)]
            name = str(worker)
            if not self._pools.knows(name, successor.epoch):  # else the successor's pool is open already
                self._stepper.send(PoolClosed(pool_id=name, pool_epoch=successor.epoch - 1, **self._origin))
                self._pools.close(name)
        elif role is Role.PREPROCESS:
            hit = [choices for choices in open_requests if choices.is_waiting]
        else:
            return
        for choices in hit:
            was_executing = digest_of(choices.request_id) in successor.executed
            interruption = Interruption(f"{worker} died", role if was_executing else None)
            self._requests.interrupt(choices, interruption, now)

    # New requests, queries, aborts and refusals.

    def _on_generate(self, message: GenerateRequest, now: float, frames: Sequence[memoryview]) -> None:
        request_id, clients = message.request_id, self._clients
        current, ended = self._requests.open.get(request_id), clients.ended(request_id)
        known = current or ended
        if known is not None and known.client_id != message.client_id:
            # Another client's id. Preprocess refuses such a request, unless it was restarted.
            self._requests.tell_preprocess(message.client_id, request_id, message.attempt)
            clients.tell_failed(message.client_id, request_id, message.attempt, _in_use(request_id))
            return
        if ended is not None and ended.attempt >= message.attempt:
            self._requests.tell_preprocess(message.client_id, request_id, message.attempt, ended.failure)
            clients.tell_ended(request_id, ended)
            return
        if current is not None:
            if current.attempt >= message.attempt:
                self.counters["stale_messages"] += 1
                return
            self._requests.forget(current)
        self._open(message, now, frames)

    def _open(self, message: GenerateRequest, now: float, frames: Sequence[memoryview]) -> None:
        adapter = self._adapters.get(message.adapter)
        if adapter is None:  # preprocess has read other options
            unknown = ErrorInfo(404, f"the adapter {message.adapter!r} is not served here", "adapter")
            ended = Ended(message.client_id, message.attempt, now, unknown)
            self._end_unknown(message.request_id, ended)
            return
        choices = Choices.from_wire(message, self._welcome.max_model_len, adapter)
        if message.sampling.max_tokens == 0:
            self._tell_prompt(choices, now)
            return
        self._requests.add(choices)
        if refusal := self._refusal(choices):
            self._requests.fail(choices, refusal, now)
            self._leases.drop_early(choices.request_id, choices.attempt)
            return
        self._matcher_starts.begin(choices.open, frames[0] if frames else b"")
        self._requests.stats.counters["prompt_tokens"] += choices.num_prompt_tokens
        self._clients.tell_accepted(choices)
        for early in self._leases.take_early(choices.request_id):
            self.handle(early, now)

    def _tell_prompt(self, choices: Choices, now: float) -> None:
        """Ends a request for nothing but its prompt's token ids."""
        failure = self._refusal_of_client(choices)
        if failure is None:
            self._clients.tell_accepted(choices)
            for request in choices.all:
                request.finish_reason = FinishReason.LENGTH
        self._requests.tell_preprocess(choices.client_id, choices.request_id, choices.attempt, failure)
        ended = self._clients.remember_choices(choices, failure, now)
        self._clients.tell_ended(choices.request_id, ended)

    def _refusal(self, choices: Choices) -> Failure | None:
        """Why the request cannot run; None: it can."""
        if failure := self._refusal_of_client(choices):
            return failure
        if (leader := choices.leader) is None:
            return ErrorInfo(400, "all choices are over already", "choices")
        for chunk in leader.chunks:
            for worker in chunk.wire.sources:
                if chunk.wire.is_lost_with(worker, self.epochs.get(worker, 0)):
                    return Interruption(f"{worker} died")
        return next(filter(None, map(self._too_long, choices.open)), None)

    def _refusal_of_client(self, choices: Choices) -> Failure | None:
        if choices.client_id not in self._clients:
            return Interruption("its client had left")  # while its media were fetched
        if (protocol := self._clients.protocol_of(choices.client_id)) is None:
            return Interruption("its client has to say hello again")  # it may not have noticed a disconnect
        if protocol != PROTOCOL_VERSION:
            reason = f"the client speaks protocol {protocol}, the pipeline speaks protocol {PROTOCOL_VERSION}"
            return ErrorInfo(400, reason)
        return None

    def _too_long(self, request: Request) -> ErrorInfo | None:
        limit, capacity = self._welcome.max_model_len, self._stepper.scheduler.cache.capacity
        if request.num_tokens >= limit:
            return context_overflow(limit, request.num_tokens, request.sampling.max_tokens, "messages")
        if request.max_num_tokens > capacity:
            length = f"prompt and output of {request.max_num_tokens} tokens"
            return ErrorInfo(400, f"{length} can never fit the KV cache of {capacity} tokens", "max_tokens")
        if len(request.output_token_ids) >= request.max_tokens:
            reason = f"all {request.max_tokens} output tokens are there already"
            return ErrorInfo(400, reason, "choices")
        return None

    def _on_query(self, message: QueryRequest, now: float) -> None:
        """Answers how far an attempt is. An unknown attempt is interrupted, not started."""
        request_id, clients = message.request_id, self._clients
        choices, ended = self._requests.open.get(request_id), clients.ended(request_id)
        known = choices or ended
        if known is not None and known.attempt > message.attempt:
            self.counters["stale_messages"] += 1
            return
        if known is None or known.attempt < message.attempt or known.client_id != message.client_id:
            is_greeted = message.client_id in clients and clients.protocol_of(message.client_id) is not None
            why = "it is not known here" if is_greeted else "its client has to say hello again"
            unknown = Ended(message.client_id, message.attempt, now, Interruption(why))
            clients.tell_ended(request_id, unknown)
            self._requests.tell_preprocess(message.client_id, request_id, message.attempt)
        elif choices is not None:
            clients.tell_accepted(choices)
            missed = [output_of(one, message.num_received_of(one.index)) for one in choices.all]
            clients.tell_outputs(message.client_id, missed)
        elif ended is not None:
            self._requests.tell_preprocess(message.client_id, request_id, message.attempt)
            clients.tell_ended(request_id, ended, message.num_received_of)

    def _on_not_yours(self, message: RequestNotYours, now: float) -> None:
        """Refuses a request whose id another client uses. If it is this client's request that runs here
        (preprocess was restarted, and another client submitted the id), it answers like a query."""
        client_id, request_id, attempt = message.client_id, message.request_id, message.attempt
        choices = self._requests.open.get(request_id)
        if choices is not None and choices.client_id == client_id:
            self._on_query(QueryRequest(client_id=client_id, request_id=request_id, attempt=attempt), now)
        else:
            self._clients.tell_failed(client_id, request_id, attempt, _in_use(request_id))

    def _on_abort(self, message: AbortRequest, now: float) -> None:
        request_id = message.request_id
        known = self._requests.known(request_id)
        if known is not None and known.client_id != message.client_id:
            return
        choices = self._requests.open.get(request_id)
        if message.index is not None:
            self._on_abort_of_choice(message, message.index, now)
        elif choices is not None and choices.attempt <= message.attempt:
            self._requests.abort(choices, now)
        else:
            outputs = (aborted_output(request_id, message.attempt, 0),)
            self._end_unknown(request_id, Ended(message.client_id, message.attempt, now, None, outputs))

    def _on_abort_of_choice(self, message: AbortRequest, index: int, now: float) -> None:
        """Aborts one choice; the others go on. If the choice has ended, its end is sent again."""
        choices, ended = self._requests.open.get(message.request_id), self._clients.ended(message.request_id)
        if choices is not None and choices.attempt == message.attempt:
            request = choices.find(index)
            if request is not None and not request.is_over:
                self._requests.abort_choice(request, now)
            else:
                told = aborted_output(message.request_id, message.attempt, index)
                if request is not None:
                    told = output_of(request, len(request.output_token_ids))
                self._clients.tell_outputs(message.client_id, [told])
        elif ended is not None and ended.attempt == message.attempt:
            self._clients.tell_ended(message.request_id, ended)

    def _on_refused(self, message: RequestRefused, now: float) -> None:
        """Ends a request that preprocess refused, before it ran or while it runs."""
        request_id = message.request_id
        known = self._requests.known(request_id)
        if known is not None and known.client_id != message.client_id:
            return
        choices = self._requests.open.get(request_id)
        if choices is not None and choices.attempt <= message.attempt:
            self._requests.fail(choices, message.error, now)
        else:
            self._end_unknown(request_id, Ended(message.client_id, message.attempt, now, message.error))

    def _end_unknown(self, request_id: str, ended: Ended) -> None:
        """Ends an attempt that does not run here. It is remembered, so that it does not start if it arrives
        late."""
        self._requests.tell_preprocess(ended.client_id, request_id, ended.attempt)
        before = self._clients.ended(request_id)
        if before is None or before.attempt < ended.attempt:
            self._clients.remember(request_id, ended)
            self._leases.drop_early(request_id, ended.attempt)
            before = ended
        self._clients.tell_ended(request_id, before)


def _in_use(request_id: str) -> ErrorInfo:
    return ErrorInfo(409, f"request_id {request_id!r} is in use by another client", "request_id")
