"""Messages between clients and the pipeline: the edges ingest and outputs."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import msgspec

from pipeline.wire.base import Message, WorkerMessage
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.prompts import Prompt
from pipeline.wire.sampling import FinishReason, SamplingParams
from pipeline.wire.topology import Role
from pipeline.wire.trace_context import Trace

PROTOCOL_VERSION = 7
CLIENT_ID_BYTES = 16
MAX_REQUEST_ID = 256  # characters
MAX_TENANT = 256  # characters
MAX_SALT_BYTES = 256
RequestId = Annotated[str, msgspec.Meta(max_length=MAX_REQUEST_ID)]


class Hello(Message, frozen=True, kw_only=True):
    """client → preprocess → llm: I am here; repeated until `Welcome` comes."""

    client_id: bytes
    protocol: int


class ChoiceProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the client of an interrupted request has of one of its choices."""

    output_token_ids: bytes = b""  # of all attempts so far: the next attempt continues behind them
    is_over: bool = False  # its terminal message has arrived: it is not run again


class SubmitRequest(Message, frozen=True, kw_only=True):
    """client → preprocess: run this attempt."""

    client_id: bytes
    request_id: RequestId
    attempt: int
    prompt: Prompt
    sampling: SamplingParams
    choices: tuple[ChoiceProgress, ...] = ()  # of earlier attempts, by index; empty: no outputs yet
    priority: int = 0  # lower goes first
    cache_salt: bytes = b""  # only requests with the same salt share cached prefixes
    adapter: str = ""  # one of those in `Welcome`; empty: the model without one
    lead: int | None = None  # of the group that has accepted it, in an earlier attempt or in this one
    leads: tuple[int, ...] = ()  # of the groups that know the client and so may run it; empty: all groups
    tenant: str = ""  # see docs/fairness.md; empty: the client is the tenant
    trace: Trace = msgspec.UNSET


class AbortRequest(Message, frozen=True, kw_only=True):
    """client → preprocess → llm: end this; repeated until the terminal message comes."""

    client_id: bytes
    request_id: RequestId
    attempt: int
    index: int | None = None  # of the choice to abort; None: all choices
    lead: int | None = None  # of the group that has accepted it


class QueryRequest(Message, frozen=True, kw_only=True):
    """client → preprocess → llm: what came of this attempt? It never starts anything.

    Answered with what was missed, with `Preparing`, or with `Interrupted` where nobody knows the attempt.
    """

    client_id: bytes
    request_id: RequestId
    attempt: int
    num_received: tuple[Annotated[int, msgspec.Meta(ge=0)], ...] = ()  # tokens of each choice, by index
    lead: int | None = None  # of the group that has accepted it

    def num_received_of(self, index: int) -> int:
        return self.num_received[index] if index < len(self.num_received) else 0


# ingest: clients → preprocess
IngestMessage = Hello | SubmitRequest | QueryRequest | AbortRequest


class Preparing(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → llm → client: the answer to a query about a request whose media are still on their way."""

    client_id: bytes
    request_id: str
    attempt: int


class Welcome(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: you are known; this is the model, and these are your credits."""

    protocol: int
    model_folder: str  # has the tokenizer's files
    tokenizer_hash: bytes  # BLAKE2b, 16 bytes, of tokenizer.json
    model_name: str
    adapters: tuple[str, ...] = ()  # names that requests may give
    max_model_len: int
    max_requests: int  # open at once
    max_request_bytes: int  # of one SubmitRequest with its frames
    max_attempts: int = 3  # a request that was executing in so many workers when they died is given up
    recovery_timeout: float = 60.0  # seconds that a request waits for dead workers' successors


class Accepted(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: the request runs, in the group that the sender leads."""

    request_id: str
    attempt: int
    num_prompt_tokens: int
    mm_hashes: tuple[bytes, ...]
    prompt_token_ids: bytes = b""  # if requested


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probabilities of the n prompt tokens behind the first: of each one itself, then of the likeliest
    ones."""

    token_ids: bytes  # int32 [n, 1 + k]
    logprobs: bytes  # float32 [n, 1 + k]
    ranks: bytes  # int32 [n]: of the token itself; the likeliest has rank 1


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probabilities at one output token: of itself first, then of the likeliest ones, best first."""

    token_ids: bytes  # int32
    logprobs: bytes  # float32


class MediaTokens(NamedTuple):
    """The tokens of a prompt's pictures and videos, by where their embeddings came from."""

    encoded: int = 0  # by a ViT, for this request
    vit_cached: int = 0  # encoded before, kept by a ViT
    prefix_cached: int = 0  # among the prompt's cached tokens


class RequestOutput(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """New tokens of one choice; with a `finish_reason` they are its last."""

    request_id: str
    attempt: int
    offset: int  # tokens before these: a gap shows
    new_token_ids: bytes
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each new token, if requested
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    index: int = 0  # of the choice
    prompt_logprobs: PromptLogprobs | None = None  # if requested: in one output at offset 0
    media: MediaTokens | None = None  # None: the prompt has no pictures and videos


class TokenOutputs(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: the new tokens of one step, for all of this client's requests."""

    outputs: tuple[RequestOutput, ...]


class RequestFailed(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: the request ended with an error, and with it all choices that were not over."""

    request_id: str
    attempt: int
    error: ErrorInfo


class Interrupted(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: the attempt is over, or unknown. Submit again, with the next attempt."""

    request_id: str
    attempt: int
    reason: str
    died: Role | None = None  # the role of a worker that died, if the request was executing in it


# outputs: llm rank 0 → clients
OutputsMessage = Welcome | Preparing | Accepted | TokenOutputs | RequestFailed | Interrupted
