"""Messages to rank 0 of an LLM group, from preprocess and ViTs: the edge llm."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from pipeline.wire.base import ChunkKey, Order, PoolOpened, WorkerMessage
from pipeline.wire.clients import AbortRequest, ChoiceProgress, Hello, Preparing, QueryRequest
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.handles import TensorHandle
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role, WorkerId
from pipeline.wire.trace_context import Trace


class Via(NamedTuple):
    """A carrier on a chunk's way, and its epoch when the chunk was routed."""

    node: int
    epoch: int


class MmChunk(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A chunk and the ViT that the router chose for it."""

    mm_hash: bytes
    num_tokens: int
    vit: int
    vit_epoch: int
    carriers: tuple[Via, ...] = ()  # that its pixels or its embeddings pass

    @property
    def sources(self) -> list[WorkerId]:
        """The workers whose death loses the chunk until it is read."""
        return [WorkerId(Role.VIT, self.vit), *(WorkerId(Role.CARRIER, via.node) for via in self.carriers)]

    def is_lost_with(self, worker: WorkerId, epoch: int) -> bool:
        """Whether it was to come from, or through, a worker that has died. `epoch` is its successor's."""
        match worker.role:
            case Role.VIT:
                return self.vit == worker.rank and self.vit_epoch < epoch
            case Role.CARRIER:
                return any(via.node == worker.rank and via.epoch < epoch for via in self.carriers)
            case _:
                return False


class Span(NamedTuple):
    """A run of placeholders: tokens [offset, offset + length) of a prompt."""

    offset: int
    length: int

    @property
    def stop(self) -> int:
        return self.offset + self.length


class MmItem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A picture or video in the prompt: one or several runs of placeholders, filled by its chunks in order.

    `mm_hash` tells apart what is seen. `kv_hash` is the item's key in the prefix cache and tells apart all
    that its KV depends on: where positions depend on more than pixels, that is more than `mm_hash` does.
    """

    spans: tuple[Span, ...]
    mm_hash: bytes
    kv_hash: bytes
    chunks: tuple[MmChunk, ...]

    @property
    def stop(self) -> int:
        """The first token after the item."""
        return self.spans[-1].stop


class GenerateRequest(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → llm: a request's metadata, sent before any of its pixels.

    The compiled grammar, if the sampling has one, is the only frame behind the message.
    """

    client_id: bytes
    request_id: str
    attempt: int
    arrival: int
    prompt_token_ids: bytes
    positions: bytes  # int32 [3, prompt]: time, height and width of each token
    position_delta: int  # added to the index of a token after the prompt
    items: tuple[MmItem, ...]
    sampling: SamplingParams
    choices: tuple[ChoiceProgress, ...] = ()  # of earlier attempts, by index
    priority: int = 0
    cache_salt: bytes = b""
    adapter: str = ""  # its name; empty: the model without one
    tenant: str = ""  # whose turn the request takes; empty: the client is the tenant
    # Its first attempt, in seconds of the machine's monotonic clock; 0: unknown, or on another machine.
    arrived_at: float = 0.0
    trace: Trace = msgspec.UNSET


class EmbeddingReady(WorkerMessage, frozen=True, kw_only=True):
    """vit, carrier → llm: the embeddings of one chunk are in my pool, leased to you."""

    key: ChunkKey
    lease_id: int
    embeddings: TensorHandle  # [num_tokens, hidden]
    was_encoded: bool  # since the request came; else it was in my cache
    sent_at: float = 0.0  # in seconds of the machine's monotonic clock; 0: unknown
    order: Order | None = None  # None: it answers a `LeaseRequest`


class EncodeFailed(WorkerMessage, frozen=True, kw_only=True):
    """vit, carrier → llm: this chunk cannot be encoded."""

    key: ChunkKey
    error: ErrorInfo


class LeaseRefused(WorkerMessage, frozen=True, kw_only=True):
    """vit, carrier → llm: this chunk is no longer in my cache, or cannot be carried."""

    key: ChunkKey


class RequestRefused(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → llm: the request cannot run, or its media turned out broken while it did."""

    client_id: bytes
    request_id: str
    attempt: int
    error: ErrorInfo


class RequestNotYours(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → llm: this client used the id of another client's request, which goes on."""

    client_id: bytes
    request_id: str
    attempt: int


FromPreprocess = (
    Hello | GenerateRequest | QueryRequest | AbortRequest | RequestRefused | RequestNotYours | Preparing
)


# llm: preprocess, vits and carriers → llm rank 0
LlmMessage = FromPreprocess | PoolOpened | EmbeddingReady | EncodeFailed | LeaseRefused
