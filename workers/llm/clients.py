"""The clients of rank 0: greets them, publishes outputs, cuts off clients that do not read, remembers how
requests ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, assert_never

import msgspec
import numpy as np

from pipeline.transport.ends import Subscription
from pipeline.wire.base import Origin
from pipeline.wire.clients import (
    Accepted,
    Interrupted,
    OutputsMessage,
    Preparing,
    PromptLogprobs,
    RequestFailed,
    RequestOutput,
    TokenOutputs,
    Welcome,
)
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import FinishReason
from pipeline.wire.topology import Role
from workers.llm.choices import Choices
from workers.llm.request import Request
from workers.llm.sampling.tokens import PromptScores

logger = logging.getLogger(__name__)
MEMORY_OF_ENDED_S = 60.0  # a query about an ended request is answered this long
MAX_ENDED = 1 << 16  # ended requests remembered: a client can abort ids that never existed
MAX_CLIENTS = 1 << 14  # known at once; further subscriptions are ignored until a client leaves
GRACE_OF_CLIENTS_S = 0.8  # between a client's leaving and the end of its requests


class Interruption(NamedTuple):
    """The request cannot go on here; its client is to submit it again."""

    reason: str
    died: Role | None = None  # the role of the worker that died while it executed the request


Failure = ErrorInfo | Interruption


class Ended(NamedTuple):
    """What is remembered of a request that has ended."""

    client_id: bytes
    attempt: int
    time: float
    failure: Failure | None  # None: every choice had its last output
    outputs: tuple[RequestOutput, ...] = ()  # one for each choice, from its first token on
    # The choice whose first output came with the prompt's logprobs or token ids: these are not remembered.
    told_prompt: int | None = None


class Publish(Protocol):
    def __call__(self, message: OutputsMessage, topic: bytes) -> bool: ...


@dataclass(slots=True)
class _Client:
    protocol: int | None = None  # None before its hello
    left_at: float | None = None
    is_cut_off: bool = False

    def has_left(self, now: float) -> bool:
        return self.left_at is not None and now - self.left_at >= GRACE_OF_CLIENTS_S


class Clients:
    """`publish` returns False when a client lags too far behind. Times are seconds of any steady clock."""

    def __init__(self, origin: Origin, welcome: Welcome, publish: Publish) -> None:
        self._origin, self._welcome, self._publish = origin, welcome, publish
        self._clients: dict[bytes, _Client] = {}
        self._ended: dict[str, Ended] = {}  # oldest first
        self.num_cut_off = 0

    def __contains__(self, client_id: bytes) -> bool:
        return client_id in self._clients

    def on_subscriptions(self, events: Iterable[Subscription], now: float) -> None:
        for topic, is_new in events:
            if is_new and (topic in self._clients or len(self._clients) < MAX_CLIENTS):
                self._clients[topic] = _Client()
            elif not is_new and topic in self._clients:
                self._clients[topic].left_at = now

    def protocol_of(self, client_id: bytes) -> int | None:
        return self._clients[client_id].protocol

    def greet(self, client_id: bytes, protocol: int) -> None:
        """Answers a client's hello, if the client is subscribed.

        A hello does not undo a leave: only a subscription does.
        """
        if (client := self._clients.get(client_id)) is not None:
            client.protocol, client.is_cut_off = protocol, False
            self.publish(self._welcome, client_id)

    def publish(self, message: OutputsMessage, client_id: bytes) -> None:
        client = self._clients.get(client_id)
        if client is None or client.is_cut_off or self._publish(message, client_id):
            return
        logger.warning("a client does not read its outputs: cut off")
        client.is_cut_off = True
        self.num_cut_off += 1

    def lost(self, now: float) -> list[bytes]:
        """The clients whose requests are to end: cut off, or gone for longer than the grace."""
        return [
            client_id
            for client_id, client in self._clients.items()
            if client.is_cut_off or client.has_left(now)
        ]

    def forget(self, now: float) -> None:
        """Forgets clients that have left and requests that ended long ago."""
        for client_id, client in list(self._clients.items()):
            if client.has_left(now):
                del self._clients[client_id]
        for request_id, ended in list(self._ended.items()):
            if now - ended.time < MEMORY_OF_ENDED_S:
                break
            del self._ended[request_id]

    # Messages to clients.

    def tell_preparing(self, message: Preparing) -> None:
        """Passes on preprocess's answer to a client's query: preprocess has no socket to clients."""
        told = msgspec.structs.replace(message, **self._origin)
        self.publish(told, message.client_id)

    def tell_accepted(self, choices: Choices) -> None:
        accepted = Accepted(
            request_id=choices.request_id, attempt=choices.attempt,
            num_prompt_tokens=choices.num_prompt_tokens, mm_hashes=choices.mm_hashes,
            prompt_token_ids=choices.told_prompt, **self._origin,
        )  # fmt: skip
        self.publish(accepted, choices.client_id)

    def tell_outputs(self, client_id: bytes, outputs: Sequence[RequestOutput]) -> None:
        self.publish(TokenOutputs(outputs=tuple(outputs), **self._origin), client_id)

    def tell_failed(self, client_id: bytes, request_id: str, attempt: int, error: ErrorInfo) -> None:
        self.publish(
            RequestFailed(request_id=request_id, attempt=attempt, error=error, **self._origin), client_id
        )

    def ended(self, request_id: str) -> Ended | None:
        return self._ended.get(request_id)

    def remember(self, request_id: str, ended: Ended) -> Ended:
        self._ended.pop(request_id, None)
        self._ended[request_id] = ended
        if len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        return ended

    def remember_choices(self, choices: Choices, failure: Failure | None, now: float) -> Ended:
        # The tokens of a failed or interrupted request are not sent again.
        ended_well = [request for request in choices.all if failure is None]
        outputs = tuple(
            msgspec.structs.replace(output_of(request, 0), prompt_logprobs=None) for request in ended_well
        )
        told = (one.index for one in ended_well if one.prompt_scores or one.sampling.max_tokens == 0)
        ended = Ended(choices.client_id, choices.attempt, now, failure, outputs, next(told, None))
        return self.remember(choices.request_id, ended)

    def tell_ended(
        self, request_id: str, ended: Ended, num_received: Callable[[int], int] | None = None
    ) -> None:
        """`num_received` maps a choice's index to the number of tokens that the client has; None: all."""
        choice = ended.told_prompt
        if choice is not None and num_received is not None and not num_received(choice):
            gone = Interruption("what it asked about its prompt is no longer here")
            ended = ended._replace(failure=gone)
        match ended.failure:
            case ErrorInfo():
                self.tell_failed(ended.client_id, request_id, ended.attempt, ended.failure)
            case Interruption(reason, died):
                told = Interrupted(
                    request_id=request_id, attempt=ended.attempt, reason=reason, died=died, **self._origin
                )
                self.publish(told, ended.client_id)
            case None:
                outputs = [
                    _behind(output, None if num_received is None else num_received(output.index))
                    for output in ended.outputs
                ]
                self.tell_outputs(ended.client_id, outputs)
            case _:
                assert_never(ended.failure)


def aborted_output(request_id: str, attempt: int, index: int) -> RequestOutput:
    """The last output of an aborted choice that is unknown here."""
    return RequestOutput(request_id, attempt, 0, b"", FinishReason.ABORT, index=index)


def _behind(output: RequestOutput, num_received: int | None) -> RequestOutput:
    """A choice's output without the tokens that the client has received; `num_received` None: all of them."""
    offset = len(output.new_token_ids) // 4 if num_received is None else num_received
    return msgspec.structs.replace(
        output,
        offset=offset,
        new_token_ids=output.new_token_ids[4 * offset :],
        logprobs=output.logprobs[offset:],
        prompt_logprobs=None if offset else output.prompt_logprobs,
    )


def output_of(request: Request, offset: int) -> RequestOutput:
    """The tokens of a choice from `offset` on."""
    token_ids = pack_int32(request.output_token_ids[offset:])
    logprobs = tuple(request.logprobs[offset:])
    has_prompt = offset == 0 and request.output_token_ids and request.prompt_scores
    return RequestOutput(
        request.request_id,
        request.attempt,
        offset,
        token_ids,
        request.finish_reason,
        logprobs,
        request.num_cached_tokens,
        request.index,
        _prompt_logprobs(request.prompt_scores) if has_prompt else None,
        request.media_tokens() if request.output_token_ids else None,
    )


def _prompt_logprobs(parts: Sequence[PromptScores]) -> PromptLogprobs:
    token_ids, logprobs, ranks = (np.concatenate([part[column] for part in parts]) for column in (1, 2, 3))
    return PromptLogprobs(
        token_ids.astype("<i4").tobytes(), logprobs.astype("<f4").tobytes(), ranks.astype("<i4").tobytes()
    )
