"""A request of this client between its submission and its end."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from pipeline.wire.clients import ChoiceProgress, QueryRequest, RequestOutput, SubmitRequest
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.topology import Role


@dataclass(slots=True, eq=False)
class OpenChoice:
    """What has come of one choice of a request."""

    token_ids: list[int] = field(default_factory=list)
    num_earlier_tokens: int = 0  # of them, in attempts before this
    num_cached_tokens: int | None = None  # of the prompt, as the first attempt found them
    is_over: bool = False  # its last output is here, or it was aborted
    heard: float = -math.inf  # when it was last heard of


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request between its submission and the end of its last choice.

    `events` has the last output of each choice, or ends with an error.
    """

    request: SubmitRequest
    frames: list[bytes | memoryview]
    heard: float  # when its submission went out, or something about it came in
    asked: float = -math.inf  # when it was last asked about
    num_prompt_tokens: int = 0
    mm_hashes: tuple[bytes, ...] | None = None  # of the pictures, as first accepted
    is_accepted: bool = False  # this attempt
    is_asking: bool = False  # a query for missed tokens is under way
    is_held: bool = False  # not submitted (again) yet
    has_failed: bool = False
    generation: int = 0  # of the weights that its tokens are of
    # of workers in which it was executing, in a row, with no new token between
    deaths: Counter[Role] = field(default_factory=Counter)
    waits_since: float | None = None  # for a dead worker's successor
    events: asyncio.Queue[RequestOutput | ErrorInfo] = field(default_factory=asyncio.Queue)
    choices: list[OpenChoice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [OpenChoice() for _ in range(self.request.sampling.n)]

    @property
    def is_over(self) -> bool:
        """All its terminal messages are here, if not yet taken: nothing more is to happen to it."""
        return self.has_failed or all(choice.is_over for choice in self.choices)

    @property
    def has_tokens(self) -> bool:
        """Any choice has tokens, of this attempt or of earlier ones."""
        return any(choice.token_ids for choice in self.choices)

    @property
    def has_progress(self) -> bool:
        """Any choice has new tokens in this attempt: attempts and deaths are the request's."""
        return any(len(choice.token_ids) > choice.num_earlier_tokens for choice in self.choices)

    def fail(self, error: ErrorInfo) -> None:
        self.has_failed = True
        self.events.put_nowait(error)

    def progress(self) -> tuple[ChoiceProgress, ...]:
        """What the next submission says of each choice; empty before the first token or end."""
        if not any(choice.token_ids or choice.is_over for choice in self.choices):
            return ()
        return tuple(ChoiceProgress(pack_int32(choice.token_ids), choice.is_over) for choice in self.choices)

    def hear(self, now: float) -> None:
        """A message about the whole request has arrived, or the silence of all its choices is explained."""
        self.heard = now
        for choice in self.choices:
            choice.heard = now

    @property
    def silent_since(self) -> float:
        """When the open choice that has been silent longest was last heard of."""
        return min((choice.heard for choice in self.choices if not choice.is_over), default=self.heard)

    def begin_attempt(self, now: float) -> None:
        """The attempt before is over. The next one continues each choice behind its tokens."""
        self.request = msgspec.structs.replace(self.request, attempt=self.request.attempt + 1)
        for choice in self.choices:
            choice.num_earlier_tokens = len(choice.token_ids)
        self.is_accepted, self.is_asking, self.is_held = False, False, True
        if self.waits_since is None:
            self.waits_since = now

    def take(self, output: RequestOutput) -> bool:
        """Puts what is new into `events`. The answer to a query may repeat tokens that are here.

        Returns False, with nothing done, if tokens between are missing.
        """
        choice = self.choices[output.index]
        if choice.is_over:
            self.is_asking = False  # it repeats the choice's end, or the choice was aborted
            return True
        num_received = len(choice.token_ids)
        if output.offset > num_received:
            return False
        self.is_asking, self.waits_since, choice.heard = False, None, self.heard
        if choice.num_cached_tokens is None:
            choice.num_cached_tokens = output.num_cached_tokens
        num_repeated = num_received - output.offset
        token_ids = output.new_token_ids[4 * num_repeated :]
        if token_ids or output.finish_reason is not None:
            new = msgspec.structs.replace(
                output,
                offset=num_received,
                new_token_ids=token_ids,
                logprobs=output.logprobs[num_repeated:],
                num_cached_tokens=choice.num_cached_tokens,
            )
            choice.token_ids += unpack_int32(token_ids).tolist()
            choice.is_over = output.finish_reason is not None
            self.events.put_nowait(new)
        return True

    def query(self) -> QueryRequest:
        request = self.request
        return QueryRequest(
            client_id=request.client_id,
            request_id=request.request_id,
            attempt=request.attempt,
            num_received=tuple(len(choice.token_ids) for choice in self.choices),
            lead=request.lead,
        )
