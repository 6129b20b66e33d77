"""A request of this client between its submission and its end."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from pipeline.wire.clients import ChoiceProgress, MediaTokens, QueryRequest, RequestOutput, SubmitRequest
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.packing import pack_int32, unpack_ids
from pipeline.wire.topology import Role


@dataclass(slots=True, eq=False)
class OpenChoice:
    """The outputs so far of one choice of a request."""

    token_ids: list[int] = field(default_factory=list)
    num_earlier_tokens: int = 0  # of `token_ids`: from earlier attempts
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache by the first attempt
    media: MediaTokens | None = None  # as the first attempt found them
    is_over: bool = False  # its last output is here, or it was aborted
    heard: float = -math.inf  # time of the last message about it


@dataclass(slots=True, eq=False)
class OpenRequest:
    """A request between its submission and the end of its last choice.

    `events` ends with the last output of every choice, or with an error.
    """

    request: SubmitRequest
    frames: list[bytes | memoryview]
    heard: float  # time of its submission, or of the last message about it
    asked: float = -math.inf  # time of the last query
    num_prompt_tokens: int = 0
    prompt_token_ids: tuple[int, ...] = ()  # if requested
    mm_hashes: tuple[bytes, ...] | None = None  # of its pictures, when an attempt was last accepted
    is_accepted: bool = False  # this attempt
    is_asking: bool = False  # a query is unanswered
    is_held: bool = False  # waits to be submitted or resubmitted
    has_failed: bool = False
    generation: int = 0  # of the weights that its tokens come from
    # Deaths of workers that executed it, in a row, by role; a new token resets them.
    deaths: Counter[Role] = field(default_factory=Counter)
    on_interrupted: Callable[[int, str], None] | None = None  # called with the attempt, and why it ended
    waits_since: float | None = None  # since when it waits for a worker to serve
    events: asyncio.Queue[RequestOutput | ErrorInfo] = field(default_factory=asyncio.Queue)
    choices: list[OpenChoice] = field(init=False)

    def __post_init__(self) -> None:
        self.choices = [OpenChoice() for _ in range(self.request.sampling.n)]

    @property
    def is_over(self) -> bool:
        """All its terminal messages are here, even if not read from `events` yet."""
        return self.has_failed or all(choice.is_over for choice in self.choices)

    @property
    def has_tokens(self) -> bool:
        """Whether any choice has tokens, of this attempt or of earlier ones."""
        return any(choice.token_ids for choice in self.choices)

    @property
    def has_progress(self) -> bool:
        """Whether any choice has new tokens in this attempt, as attempts and deaths count per request."""
        return any(len(choice.token_ids) > choice.num_earlier_tokens for choice in self.choices)

    def fail(self, error: ErrorInfo) -> None:
        self.has_failed = True
        self.events.put_nowait(error)

    def progress(self) -> tuple[ChoiceProgress, ...]:
        """Each choice's progress for the next submission; empty before the first token or end."""
        if not any(choice.token_ids or choice.is_over for choice in self.choices):
            return ()
        return tuple(ChoiceProgress(pack_int32(choice.token_ids), choice.is_over) for choice in self.choices)

    def hear(self, now: float) -> None:
        """Resets the silence of all choices: a message came, or the silence is explained."""
        self.heard = now
        for choice in self.choices:
            choice.heard = now

    @property
    def silent_since(self) -> float:
        """Time of the last message about the open choice that has been silent longest."""
        return min((choice.heard for choice in self.choices if not choice.is_over), default=self.heard)

    def begin_attempt(self, now: float) -> None:
        """Begins the next attempt, which continues each choice behind its tokens."""
        self.request = msgspec.structs.replace(self.request, attempt=self.request.attempt + 1)
        for choice in self.choices:
            choice.num_earlier_tokens = len(choice.token_ids)
        self.is_accepted, self.is_asking, self.is_held = False, False, True
        if self.waits_since is None:
            self.waits_since = now

    def take(self, output: RequestOutput) -> bool:
        """Puts new tokens into `events`, without repeated ones, as the answer to a query may have.

        Returns False and does nothing if there is a gap before the output.
        """
        choice = self.choices[output.index]
        if choice.is_over:
            self.is_asking = False  # the output repeats the choice's end, or the choice was aborted
            return True
        num_received = len(choice.token_ids)
        if output.offset > num_received:
            return False
        self.is_asking, self.waits_since, choice.heard = False, None, self.heard
        if choice.num_cached_tokens is None:
            choice.num_cached_tokens = output.num_cached_tokens
        if choice.media is None:
            choice.media = output.media
        if output.offset < num_received or _found_of(output) != _found_of(choice):
            num_repeated = num_received - output.offset
            output = msgspec.structs.replace(
                output,
                offset=num_received,
                new_token_ids=output.new_token_ids[4 * num_repeated :],
                logprobs=output.logprobs[num_repeated:],
                num_cached_tokens=choice.num_cached_tokens,
                media=choice.media,
                prompt_logprobs=None if num_received else output.prompt_logprobs,
            )
        if output.new_token_ids or output.finish_reason is not None:
            choice.token_ids += unpack_ids(output.new_token_ids)
            choice.is_over = output.finish_reason is not None
            self.events.put_nowait(output)
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


def _found_of(known: RequestOutput | OpenChoice) -> tuple[int | None, MediaTokens | None]:
    """What the caches had of the prompt."""
    return known.num_cached_tokens, known.media
