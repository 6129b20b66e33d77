"""Messages around the ViTs: the edges encode and feedback."""

from __future__ import annotations

import msgspec

from pipeline.wire.base import ChunkKey, GridTHW, PoolOpened, WorkerMessage
from pipeline.wire.handles import TensorHandle
from pipeline.wire.trace_context import Trace


class EncodeRequest(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → vit: I want this chunk encoded.

    First without pixels, since a cached chunk needs none. The pixels follow by themselves, or are asked for.
    """

    key: ChunkKey
    arrival: int  # order of the request among all
    position: int  # order of the chunk in its request
    mm_hash: bytes
    grid_thw: GridTHW
    pixels: TensorHandle | None = None  # uint8 [t, height, width, 3]
    will_follow: bool = False  # the pixels are being decoded, and need not be requested
    adapter: str = ""  # of the request, if it changes the tower
    tenant: str = ""  # whose turn the chunk takes
    sent_at: float = 0.0  # pixels; in seconds of the machine's monotonic clock; 0: unknown
    trace: Trace = msgspec.UNSET  # of the request


class CancelEncode(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → vit: nobody wants these any more."""

    keys: tuple[ChunkKey, ...]


class LeaseReleased(WorkerMessage, frozen=True, kw_only=True):
    """llm, carrier → vit, carrier: these embeddings have been read by every rank, or copied."""

    lease_ids: tuple[int, ...]


class LeaseSet(WorkerMessage, frozen=True, kw_only=True):
    """llm, carrier → vit, carrier, once a second: all leases I hold; one that is missing twice is free, so a
    lost release heals."""

    lease_ids: tuple[int, ...]
    last_lease_id: int  # the latest lease that has arrived: later ones may still be under way


class LeaseRequest(WorkerMessage, frozen=True, kw_only=True):
    """llm → vit: a preempted request needs this chunk again.

    Answered with `EmbeddingReady` or `LeaseRefused`.
    """

    key: ChunkKey
    mm_hash: bytes


# encode.<i>: preprocess, llm rank 0 and carriers → vit i
EncodeMessage = PoolOpened | EncodeRequest | CancelEncode | LeaseReleased | LeaseSet | LeaseRequest


class PixelsReleased(WorkerMessage, frozen=True, kw_only=True):
    """vit → preprocess, or the carrier of its node: this chunk needs no pixels (any more): encoded, found in
    the cache, or cancelled."""

    key: ChunkKey


class PixelsCopied(WorkerMessage, frozen=True, kw_only=True):
    """carrier → preprocess: this chunk's pixels are in my pool; yours are free. `PixelsReleased` follows."""

    key: ChunkKey


class EncodeMiss(WorkerMessage, frozen=True, kw_only=True):
    """vit → preprocess, or the carrier of its node: I do not have this chunk, send its pixels."""

    key: ChunkKey


class ItemNotNeeded(WorkerMessage, frozen=True, kw_only=True):
    """llm → preprocess: the prefix cache covers this item; stop fetching, decoding or encoding it."""

    request_id: str
    attempt: int
    item: int


class PromptComputed(WorkerMessage, frozen=True, kw_only=True):
    """llm → preprocess: the request has its first token; from now on it takes little of the group's time."""

    client_id: bytes  # whose attempt it is
    request_id: str
    attempt: int


class RequestEnded(WorkerMessage, frozen=True, kw_only=True):
    """llm → preprocess: forget this request's media and give its credit to another."""

    client_id: bytes  # whose attempt ended: another client's use of the id ends nothing
    request_id: str
    attempt: int
    is_interrupted: bool = False  # if resubmitted, it is admitted even if the server is full


# feedback: vits, llm rank 0 and carriers → preprocess
FeedbackMessage = PixelsReleased | PixelsCopied | EncodeMiss | ItemNotNeeded | PromptComputed | RequestEnded
