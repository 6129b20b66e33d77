"""What comes in at rank 0: new requests, aborts, embeddings, the death of neighbours.

Messages of one request come over several connections, so that embeddings may be here before their request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

from pipeline.process.flight_recorder import digest_of
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.messages import (
    PROTOCOL_VERSION,
    AbortRequest,
    EmbeddingReady,
    EncodeFailed,
    GenerateRequest,
    Hello,
    LeaseRefused,
    LlmMessage,
    Origin,
    PoolClosed,
    PoolOpened,
    Preparing,
    Welcome,
    WorkerMessage,
    WorkerState,
)
from pipeline.wire.sampling import FinishReason
from pipeline.wire.topology import Role, WorkerId
from workers.llm.clients import Clients, Ended, Interruption, Outcome, output_of
from workers.llm.leases import Leases, lease_of
from workers.llm.request import Chunk, Request
from workers.llm.requests import Requests
from workers.llm.stepping import Stepper


class Intake:
    """`epochs` are those of the living."""

    def __init__(
        self,
        origin: Origin,
        requests: Requests,
        stepper: Stepper,
        clients: Clients,
        leases: Leases,
        welcome: Welcome,
        epochs: Mapping[WorkerId, int],
    ) -> None:
        self._origin, self._requests, self._stepper = origin, requests, stepper
        self._clients, self._leases, self._welcome = clients, leases, welcome
        self._pools = stepper.runner.pools
        self.epochs = epochs
        self.counters = {"stale_messages": 0}

    def handle(self, message: LlmMessage, now: float) -> None:
        if isinstance(message, WorkerMessage) and message.epoch < self.epochs.get(message.sender, 0):
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
                self._stepper.send(message)  # first: the ranks open it together
                self._pools.open(message.pool)
                for embedding in self._leases.take_unmapped():
                    self._on_embedding(embedding, now)
            case EmbeddingReady():
                self._on_embedding(message, now)
            case EncodeFailed():
                if not self._is_early(message, now) and self._is_wanted(self._find_chunk(message)):
                    self._requests.end(self._requests.open[message.key.request_id], message.error, now)
            case LeaseRefused(key=key):
                if self._is_wanted(self._find_chunk(message)):
                    self._requests.interrupt(
                        self._requests.open[key.request_id],
                        Interruption("preempted"),
                        now,
                    )
            case _:
                assert_never(message)

    def on_death(self, successor: WorkerState, now: float) -> None:
        """Of a neighbour; no step may be in flight that reads what a dead ViT has left.

        Requests that needed something of it end here, to be submitted again; what has been read is not
        needed.
        """
        role, rank = successor.worker.role, successor.worker.rank
        open_requests = list(self._requests.open.values())
        if role is Role.VIT:
            self._leases.forget_vit(rank, successor.epoch)
            hit = [request for request in open_requests if request.forget_vit(rank, successor.epoch)]
            name = str(successor.worker)
            if not self._pools.knows(name, successor.epoch):  # else it has taken the dead one's place already
                self._stepper.send(PoolClosed(pool_id=name, pool_epoch=successor.epoch - 1, **self._origin))
                self._pools.close(name)
        elif role is Role.PREPROCESS:
            hit = [request for request in open_requests if any(chunk.is_awaited for chunk in request.chunks)]
        else:
            return
        for request in hit:
            was_executing = digest_of(request.request_id) in successor.executed
            interruption = Interruption(f"{successor.worker} died", role if was_executing else None)
            self._requests.interrupt(request, interruption, now)

    # New requests, and their end from outside.

    def _on_generate(self, message: GenerateRequest, now: float) -> None:
        request_id, clients = message.request_id, self._clients
        current, ended = self._requests.open.get(request_id), clients.ended(request_id)
        known = current or ended
        if known is not None and known.client_id != message.client_id:
            # Preprocess knows who uses it, unless it was restarted.
            self._requests.tell_preprocess(request_id, message.attempt)
            in_use = ErrorInfo(409, f"request_id {request_id!r} is in use by another client", "request_id")
            clients.tell_failed(message.client_id, request_id, message.attempt, in_use)
            return
        if ended is not None and ended.attempt >= message.attempt:
            self._requests.tell_preprocess(request_id, message.attempt, ended.outcome)
            clients.tell_ended(request_id, ended, message.num_received)
            return
        if current is not None:
            if current.attempt > message.attempt:
                self.counters["stale_messages"] += 1
                return
            if current.attempt == message.attempt:
                clients.tell_accepted(current)
                clients.tell_outputs(current.client_id, [output_of(current, message.num_received)])
                return
            self._requests.forget(current)
        self._open(message, now)

    def _open(self, message: GenerateRequest, now: float) -> None:
        request = Request.from_wire(message, self._welcome.max_model_len)
        self._requests.add(request)
        if refusal := self._refusal(request, message):
            self._requests.end(request, refusal, now)
            self._leases.drop_early(request.request_id)
            return
        self._requests.counters["prompt_tokens"] += len(request.prompt_token_ids)
        self._clients.tell_accepted(request)
        for early in self._leases.take_early(request.request_id):
            self.handle(early, now)

    def _refusal(self, request: Request, message: GenerateRequest) -> Outcome | None:
        """Why the request does not run, if it does not."""
        if request.client_id not in self._clients:
            return Interruption("its client had left")  # while its media were fetched
        if (protocol := self._clients.protocol_of(request.client_id)) is None:
            return Interruption("its client has to say hello again")  # it was away, and may not have noticed
        if protocol != PROTOCOL_VERSION:
            reason = f"the client speaks protocol {protocol}, the pipeline speaks protocol {PROTOCOL_VERSION}"
            return ErrorInfo(400, reason)
        if message.is_query:
            return Interruption("it is not known here")
        for chunk in request.chunks:
            if chunk.wire.vit_epoch < self.epochs.get(vit := WorkerId(Role.VIT, chunk.wire.vit), 0):
                return Interruption(f"{vit} died")
        return self._too_long(request)

    def _too_long(self, request: Request) -> ErrorInfo | None:
        limit, capacity = self._welcome.max_model_len, self._stepper.scheduler.cache.capacity
        if request.num_tokens >= limit:
            length = f"the prompt has {request.num_tokens} tokens"
            return ErrorInfo(
                400,
                f"{length}, which leaves no room in the model's context of {limit}",
                "messages",
            )
        if request.max_num_tokens > capacity:
            length = f"prompt and output of {request.max_num_tokens} tokens"
            return ErrorInfo(400, f"{length} can never fit the KV cache of {capacity} tokens", "max_tokens")
        if len(request.output_token_ids) >= request.max_tokens:
            reason = f"all {request.max_tokens} output tokens are there already"
            return ErrorInfo(400, reason, "output_token_ids")
        return None

    def _on_abort(self, message: AbortRequest, now: float) -> None:
        """From the client, or from preprocess with the reason why the request cannot run."""
        request_id, clients = message.request_id, self._clients
        if message.is_foreign:
            assert message.error is not None
            clients.tell_failed(message.client_id, request_id, message.attempt, message.error)
            return
        request, ended = self._requests.open.get(request_id), clients.ended(request_id)
        known = request or ended
        if known is not None and known.client_id != message.client_id:
            return
        if request is not None and request.attempt <= message.attempt:
            self._requests.end(request, message.error or FinishReason.ABORT, now)
            return
        self._requests.tell_preprocess(request_id, message.attempt)
        if ended is None or ended.attempt < message.attempt:
            ended = Ended(message.client_id, message.attempt, now, message.error or FinishReason.ABORT)
            clients.remember(request_id, ended)
            self._leases.drop_early(request_id)
        clients.tell_ended(request_id, ended, len(ended.output_token_ids))

    # Embeddings.

    def _on_embedding(self, message: EmbeddingReady, now: float) -> None:
        self._leases.saw(message)
        if not self._pools.knows(message.embeddings.pool_id, message.embeddings.epoch):
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
        known = self._requests.open.get(request_id) or self._clients.ended(request_id)
        if known is not None and known.attempt >= attempt:
            return False
        self._leases.keep_early(message, now)
        return True

    def _find_chunk(self, message: EmbeddingReady | EncodeFailed | LeaseRefused) -> Chunk | None:
        key = message.key
        request = self._requests.open.get(key.request_id)
        if request is None or request.attempt != key.attempt:
            return None
        matching = (chunk for chunk in request.chunks if chunk.item == key.item and chunk.index == key.chunk)
        return next(matching, None)

    def _is_wanted(self, chunk: Chunk | None) -> bool:
        """Its embeddings are waited for, also when they were lost: then they come earlier."""
        return chunk is not None and chunk.embeddings is None and not chunk.is_read
