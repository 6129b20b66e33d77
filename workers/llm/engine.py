"""Rank 0 without its process: messages in, steps, messages out. The one place that sends a request's terminal message.

    handle(message) … → step() → handle(message) … → step() → …

Leases: only this rank holds and releases them. When the result of a step is here, every rank has gathered what the step read
(the gather precedes the first all-reduce), so a chunk is released as soon as its tokens are computed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, assert_never

from torch import Tensor

from pipeline.errors import ErrorInfo, PipelineError
from pipeline.messages import (
    AbortRequest,
    Accepted,
    EmbeddingReady,
    EncodeFailed,
    EncodeMessage,
    FeedbackMessage,
    GenerateRequest,
    Hello,
    LeaseReleased,
    LeaseSet,
    LlmMessage,
    Origin,
    OutputsMessage,
    PoolOpened,
    RequestEnded,
    RequestFailed,
    RequestOutput,
    SequencePlan,
    StepPlan,
    StepsMessage,
    TokenOutputs,
    Welcome,
    WorkerMessage,
    pack_int32,
)
from pipeline.sampling import FinishReason
from pipeline.sockets import Sink, Subscription
from pipeline.tensors import PoolMap
from workers.llm.request import Chunk, Lease, Request
from workers.llm.sampler import Draw, sample
from workers.llm.scheduler import Scheduled, Scheduler

logger = logging.getLogger(__name__)
MEMORY_OF_ENDED_S = 60.0  # a query about an ended request is answered this long
GRACE_OF_CLIENTS_S = 2.0  # between a client's leaving and the end of its requests
LEASE_SET_INTERVAL_S = 1.0


class Runner(Protocol):
    pools: PoolMap

    def execute(self, sequences: Sequence[SequencePlan]) -> Tensor: ...


class Publish(Protocol):
    def __call__(self, message: OutputsMessage, topic: bytes) -> bool: ...


class Ended(NamedTuple):
    """What is remembered of a request that has ended."""

    client_id: bytes
    attempt: int
    time: float
    output_token_ids: tuple[int, ...]
    outcome: FinishReason | ErrorInfo


@dataclass(slots=True)
class _Client:
    left_at: float | None = None
    is_cut_off: bool = False


class Engine:
    """`publish_step` hands a plan to the other ranks; None when there are none. Times are seconds of any steady clock."""

    def __init__(
        self, origin: Origin, scheduler: Scheduler, runner: Runner, welcome: Welcome, merge_size: int, publish: Publish,
        publish_step: Callable[[StepsMessage], bool] | None, feedback: Sink[FeedbackMessage], vits: Sequence[Sink[EncodeMessage]],
        is_current: Callable[[WorkerMessage], bool] = lambda message: True,
    ) -> None:  # fmt: skip
        self.scheduler, self.runner = scheduler, runner
        self._origin = origin
        self._welcome, self._merge_size = welcome, merge_size
        self._publish_raw, self._publish_step = publish, publish_step
        self._feedback, self._vits, self._is_current = feedback, vits, is_current
        self.requests: dict[str, Request] = {}
        self._ended: dict[str, Ended] = {}  # oldest first
        self._early: dict[str, list[tuple[float, EmbeddingReady | EncodeFailed]]] = {}  # of requests or attempts not here yet
        self._unmapped: list[EmbeddingReady] = []  # of pools not here yet
        self._clients: dict[bytes, _Client] = {}
        self._last_lease_ids = [0] * len(vits)
        self._lease_set_due = 0.0
        self._step = 0
        self.counters = {"steps": 0, "stale_messages": 0, "clients_cut_off": 0, "prompt_tokens": 0, "output_tokens": 0}

    # What comes in.

    def handle(self, message: LlmMessage, now: float) -> None:
        if isinstance(message, WorkerMessage) and not self._is_current(message):
            self.counters["stale_messages"] += 1
            return
        match message:
            case Hello():
                if (client := self._clients.get(message.client_id)) is not None:
                    client.is_cut_off = False  # it reads again; whether it has left is for its subscription to say
                    self._publish(self._welcome, message.client_id)
            case GenerateRequest():
                self._on_generate(message, now)
            case AbortRequest():
                self._on_abort(message, now)
            case PoolOpened():
                self._on_pool(message, now)
            case EmbeddingReady():
                self._on_embedding(message, now)
            case EncodeFailed():
                if not self._is_early(message, now) and (request := self._find(message.key.request_id, message.key.attempt)) is not None:
                    self._end(request, message.error, now)
            case _:
                assert_never(message)

    def on_subscriptions(self, events: Iterable[Subscription], now: float) -> None:
        for topic, is_new in events:
            if is_new:
                self._clients[topic] = _Client()
            elif topic in self._clients:
                self._clients[topic].left_at = now

    def _find(self, request_id: str, attempt: int) -> Request | None:
        request = self.requests.get(request_id)
        if request is None or request.attempt != attempt:
            self.counters["stale_messages"] += 1
            return None
        return request

    def _on_generate(self, message: GenerateRequest, now: float) -> None:
        request_id = message.request_id
        if (ended := self._ended.get(request_id)) is not None and ended.attempt >= message.attempt:
            self._tell_preprocess(request_id, message.attempt)
            self._tell_ended(request_id, ended, message.num_received)
            return
        if (current := self.requests.get(request_id)) is not None:
            if current.attempt > message.attempt:
                self.counters["stale_messages"] += 1
                return
            if current.attempt == message.attempt:
                self._tell_accepted(current)
                missed = current.output_token_ids[message.num_received :]
                self._publish_outputs(current.client_id, [self._output(current, message.num_received, missed)])
                return
            self._forget(current)
        request = self.requests[request_id] = Request.from_wire(message, self._merge_size, self._welcome.max_model_len)
        self.scheduler.add(request)
        if refusal := self._refusal(request, message):
            self._end(request, refusal, now)
            self._drop_early(request_id)
            return
        self.counters["prompt_tokens"] += len(request.prompt_token_ids)
        self._tell_accepted(request)
        for _, early in self._early.pop(request_id, ()):
            self.handle(early, now)

    def _refusal(self, request: Request, message: GenerateRequest) -> ErrorInfo | FinishReason | None:
        """Why the request does not run, if it does not."""
        if request.client_id not in self._clients:
            return FinishReason.ABORT  # it left while its media were fetched
        if message.is_query:
            return ErrorInfo(503, "the server no longer knows this request")
        limit, capacity = self._welcome.max_model_len, self.scheduler.capacity
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
        request = self.requests.get(message.request_id)
        known = request or self._ended.get(message.request_id)
        if known is not None and known.client_id != message.client_id:
            if message.error is not None:  # preprocess refuses an id that belongs to somebody else
                failed = RequestFailed(request_id=message.request_id, attempt=message.attempt, error=message.error, **self._origin)
                self._publish(failed, message.client_id)
            return
        if request is not None and request.attempt <= message.attempt:
            self._end(request, message.error or FinishReason.ABORT, now)
            return
        self._tell_preprocess(message.request_id, message.attempt)
        ended = self._ended.get(message.request_id)
        if ended is None or ended.attempt < message.attempt:
            ended = Ended(message.client_id, message.attempt, now, (), message.error or FinishReason.ABORT)
            self._remember(message.request_id, ended)
            self._drop_early(message.request_id)
        self._tell_ended(message.request_id, ended, len(ended.output_token_ids))

    def _on_pool(self, message: PoolOpened, now: float) -> None:
        self.runner.pools.open(message.pool)
        self._send_step(message)
        unmapped, self._unmapped = self._unmapped, []
        for embedding in unmapped:
            self._on_embedding(embedding, now)

    def _on_embedding(self, message: EmbeddingReady, now: float) -> None:
        vit, key = message.sender.rank, message.key
        self._last_lease_ids[vit] = max(self._last_lease_ids[vit], message.lease_id)
        if not self.runner.pools.knows(message.embeddings.pool_id, message.embeddings.epoch):
            self._unmapped.append(message)
            return
        if self._is_early(message, now):
            return
        request = self.requests.get(key.request_id)
        chunk = _find_chunk(request, key.item, key.chunk) if request is not None and request.attempt == key.attempt else None
        if chunk is None or chunk.embeddings is not None or chunk.is_read:
            self._release([Lease(vit, message.lease_id)])
            return
        chunk.embeddings, chunk.lease = message.embeddings, Lease(vit, message.lease_id)

    def _is_early(self, message: EmbeddingReady | EncodeFailed, now: float) -> bool:
        """Keeps what a ViT says of an attempt that is not here yet: its connection may be faster than that of preprocess."""
        request_id, attempt = message.key.request_id, message.key.attempt
        known = self.requests.get(request_id) or self._ended.get(request_id)
        if known is not None and known.attempt >= attempt:
            return False
        self._early.setdefault(request_id, []).append((now, message))
        return True

    # One step.

    def step(self, now: float) -> bool:
        """Computes one step and sends what came of it. False when there is nothing to compute."""
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return False
        self._step += 1
        sequences = tuple(_plan(item) for item in scheduled)
        self._send_step(StepPlan(step=self._step, sequences=sequences, **self._origin))
        logits = self.runner.execute(sequences)
        sampled = [item.request for item in scheduled if item.is_sampled]
        draws = [Draw(request.sampling, len(request.output_token_ids)) for request in sampled]
        token_ids = sample(logits, draws) if sampled else []
        finished = self.scheduler.update(scheduled, {request.request_id: token for request, token in zip(sampled, token_ids, strict=True)})
        self.counters["steps"] += 1
        self.counters["output_tokens"] += len(sampled)
        self._release([lease for item in scheduled for lease in item.request.take_read_leases()])
        outputs: dict[bytes, list[RequestOutput]] = defaultdict(list)
        for request in sampled:
            outputs[request.client_id].append(self._output(request, len(request.output_token_ids) - 1, request.output_token_ids[-1:]))
        for client_id, of_client in outputs.items():
            self._publish_outputs(client_id, of_client)
        for request in finished:
            assert request.finish_reason is not None
            self._close(request, request.finish_reason, now)
        return True

    def _send_step(self, message: StepsMessage) -> None:
        if self._publish_step is not None and not self._publish_step(message):
            raise PipelineError("a rank does not keep up with the steps")

    # How requests end.

    def _end(self, request: Request, outcome: FinishReason | ErrorInfo, now: float) -> None:
        """Ends an open request from outside and tells its client."""
        self.scheduler.remove(request)
        self._tell_ended(request.request_id, self._close(request, outcome, now), len(request.output_token_ids))

    def _close(self, request: Request, outcome: FinishReason | ErrorInfo, now: float) -> Ended:
        del self.requests[request.request_id]
        self._release(request.take_all_leases())
        self._tell_preprocess(request.request_id, request.attempt)
        ended = Ended(request.client_id, request.attempt, now, tuple(request.output_token_ids), outcome)
        logger.debug("%s ended: %s", request.request_id, outcome)
        return self._remember(request.request_id, ended)

    def _forget(self, request: Request) -> None:
        """A higher attempt takes the place of this one: no terminal message."""
        self.scheduler.remove(request)
        del self.requests[request.request_id]
        self._release(request.take_all_leases())

    def _tell_preprocess(self, request_id: str, attempt: int) -> None:
        """The request has ended, or never began. Saying it again is harmless, not saying it would keep its credit for ever."""
        self._feedback.send(RequestEnded(request_id=request_id, attempt=attempt, **self._origin))

    def _remember(self, request_id: str, ended: Ended) -> Ended:
        self._ended.pop(request_id, None)
        self._ended[request_id] = ended
        return ended

    def _tell_ended(self, request_id: str, ended: Ended, num_received: int) -> None:
        if isinstance(ended.outcome, ErrorInfo):
            failed = RequestFailed(request_id=request_id, attempt=ended.attempt, error=ended.outcome, **self._origin)
            self._publish(failed, ended.client_id)
        else:
            missed = pack_int32(ended.output_token_ids[num_received:])
            self._publish_outputs(ended.client_id, [RequestOutput(request_id, ended.attempt, num_received, missed, ended.outcome)])

    def _tell_accepted(self, request: Request) -> None:
        accepted = Accepted(
            request_id=request.request_id, attempt=request.attempt, num_prompt_tokens=len(request.prompt_token_ids), mm_hashes=request.mm_hashes,
            **self._origin,
        )  # fmt: skip
        self._publish(accepted, request.client_id)

    def _output(self, request: Request, offset: int, token_ids: Sequence[int]) -> RequestOutput:
        return RequestOutput(request.request_id, request.attempt, offset, pack_int32(token_ids), request.finish_reason)

    def _publish_outputs(self, client_id: bytes, outputs: Sequence[RequestOutput]) -> None:
        self._publish(TokenOutputs(outputs=tuple(outputs), **self._origin), client_id)

    def _publish(self, message: OutputsMessage, client_id: bytes) -> None:
        client = self._clients.get(client_id)
        if client is None or client.is_cut_off or self._publish_raw(message, client_id):
            return
        logger.warning("a client does not read its outputs: cut off")
        client.is_cut_off = True
        self.counters["clients_cut_off"] += 1

    # Leases.

    def _release(self, leases: Iterable[Lease]) -> None:
        by_vit: dict[int, list[int]] = defaultdict(list)
        for lease in leases:
            by_vit[lease.vit].append(lease.lease_id)
        for vit, lease_ids in by_vit.items():
            self._vits[vit].send(LeaseReleased(lease_ids=tuple(lease_ids), **self._origin))

    def _held_leases(self) -> list[Lease]:
        held = [chunk.lease for request in self.requests.values() for chunk in request.chunks if chunk.lease is not None]
        early = [message for messages in self._early.values() for _, message in messages]
        waiting = [message for message in early if isinstance(message, EmbeddingReady)] + self._unmapped
        return held + [Lease(message.sender.rank, message.lease_id) for message in waiting]

    def _drop_early(self, request_id: str) -> None:
        early = [message for _, message in self._early.pop(request_id, ())]
        self._release([Lease(message.sender.rank, message.lease_id) for message in early if isinstance(message, EmbeddingReady)])

    # What time does.

    def tick(self, now: float) -> None:
        """Sends lease sets, ends the requests of clients that left or were cut off, forgets what is long over. Call it about once a second."""
        if now >= self._lease_set_due:
            self._lease_set_due = now + LEASE_SET_INTERVAL_S
            held = self._held_leases()
            for vit, sink in enumerate(self._vits):
                lease_ids = tuple(lease.lease_id for lease in held if lease.vit == vit)
                sink.send(LeaseSet(lease_ids=lease_ids, last_lease_id=self._last_lease_ids[vit], **self._origin))
        for client_id, client in list(self._clients.items()):
            has_left = client.left_at is not None and now - client.left_at >= GRACE_OF_CLIENTS_S
            if has_left or client.is_cut_off:
                for request in [request for request in self.requests.values() if request.client_id == client_id]:
                    self._end(request, FinishReason.ABORT, now)
            if has_left:
                del self._clients[client_id]
        for request_id, ended in list(self._ended.items()):
            if now - ended.time < MEMORY_OF_ENDED_S:
                break
            del self._ended[request_id]
        for request_id, early in list(self._early.items()):
            if now - early[0][0] >= MEMORY_OF_ENDED_S:
                self._drop_early(request_id)

    def check_integrity(self) -> None:
        self.scheduler.blocks.check_integrity()
        assert len(self.scheduler.waiting) + len(self.scheduler.running) == len(self.requests), "a request is lost or held twice"
        if not self.requests:
            assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks, "blocks are held for nobody"


def _find_chunk(request: Request, item: int, index: int) -> Chunk | None:
    return next((chunk for chunk in request.chunks if chunk.item == item and chunk.index == index), None)


def _plan(item: Scheduled) -> SequencePlan:
    request, start, stop = item.request, item.request.num_computed_tokens, item.request.num_computed_tokens + item.num_tokens
    return SequencePlan(
        token_ids=pack_int32(request.token_ids(start, stop)),
        positions=request.positions_of(start, stop).tobytes(),
        num_computed_tokens=start,
        block_table=pack_int32(request.block_table),
        embeddings=request.embedding_slices(start, stop),
        wants_logits=item.is_sampled,
    )
