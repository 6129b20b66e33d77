"""Every struct that crosses a process, and one union per edge.

MessagePack maps with a `type` field; unknown fields are refused. Media bytes ride as further frames of the
same multipart message. Token ids, positions and block tables travel as little-endian int32 bytes. No frame
holds a tensor: it holds a `TensorHandle`. A message of a worker names its sender and the sender's epoch.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Iterable
from typing import Annotated, NamedTuple, TypedDict

import msgspec
import numpy as np
import numpy.typing as npt

from pipeline.wire.errors import ErrorInfo
from pipeline.wire.handles import PoolInfo, TensorHandle
from pipeline.wire.metrics import Metric
from pipeline.wire.sampling import FinishReason, SamplingParams
from pipeline.wire.topology import Role, WorkerId

PROTOCOL_VERSION = 4
CLIENT_ID_BYTES = 16
MAX_REQUEST_ID = 256  # characters
MAX_TENANT = 256  # characters
MAX_SALT_BYTES = 256
RequestId = Annotated[str, msgspec.Meta(max_length=MAX_REQUEST_ID)]

Int32Array = npt.NDArray[np.int32]


def pack_int32(values: Iterable[int] | npt.NDArray[np.integer]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<i4", copy=False).tobytes()
    packed = array.array("i", values)  # several times as fast as numpy for the few tokens of a step
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int32(data: bytes) -> Int32Array:
    return np.frombuffer(data, dtype="<i4")


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    pass


class WorkerMessage(Message, frozen=True, kw_only=True):
    sender: WorkerId
    epoch: int


class Origin(TypedDict):
    """The fields of a worker that every message of it repeats."""

    sender: WorkerId
    epoch: int


class ChunkKey(NamedTuple):
    """One encode: a chunk of an item (picture, part of a video) of one attempt of a request."""

    request_id: str
    attempt: int
    item: int
    chunk: int
    lead: int = 0  # the LLM rank that runs the request, or leads the group that does


class GridTHW(NamedTuple):
    """Patches of an item: time, height, width."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w


class TextPart(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    text: str


class ImagePart(msgspec.Struct, frozen=True, tag="image", forbid_unknown_fields=True):
    """A picture by URL, or in a further frame of the message: its bytes, or its bytes in base64."""

    url: str = ""
    frame: int = -1
    is_base64: bool = False
    # the client's name for the content: what is cached under it is taken, and need not be sent again
    uuid: str = ""
    min_pixels: int | None = None  # it is resized to an area in these limits, and the server's
    max_pixels: int | None = None
    resized_height: int | None = None  # instead: to this size, rounded to what the model takes
    resized_width: int | None = None


class VideoPart(msgspec.Struct, frozen=True, tag="video", forbid_unknown_fields=True):
    """A video by URL or in a further frame of the message, as a picture is; or as a list of pictures, its
    frames."""

    url: str = ""
    frame: int = -1
    is_base64: bool = False
    frames: tuple[ImagePart, ...] = ()
    uuid: str = ""  # as a picture's
    fps: float | None = None  # frames a second that the model sees
    max_frames: int | None = None
    min_pixels: int | None = None  # of each frame
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    total_pixels: int | None = None  # of all frames together; a pair counts as one
    nframes: int | None = None  # frames that the model sees, instead of `fps`
    min_frames: int | None = None
    video_start: float | None = None  # seconds: frames are taken from this window of the video
    video_end: float | None = None


Part = TextPart | ImagePart | VideoPart


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | tuple[Part, ...]


class Chat(msgspec.Struct, frozen=True, tag="chat", forbid_unknown_fields=True):
    """The model's chat template makes a prompt of the messages."""

    messages: tuple[ChatMessage, ...]


class Text(msgspec.Struct, frozen=True, tag="text", forbid_unknown_fields=True):
    """A prompt as it is, without a template. A special token that is spelt out in the text is that token."""

    text: str


class Tokens(msgspec.Struct, frozen=True, tag="tokens", forbid_unknown_fields=True):
    """A prompt that is tokenised already."""

    token_ids: bytes  # int32


Prompt = Chat | Text | Tokens


# --- ingest: clients → preprocess
# -----------------------------------------------------------------------------------


class Hello(Message, frozen=True, kw_only=True):
    """client → preprocess → llm: I am here; repeated until `Welcome` comes."""

    client_id: bytes
    protocol: int


class ChoiceProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the client of an interrupted request has of one of its choices."""

    output_token_ids: bytes = b""  # of all attempts so far: the text goes on behind them
    is_over: bool = False  # its terminal message was there: it is not run again


class SubmitRequest(Message, frozen=True, kw_only=True):
    """client → preprocess: run this attempt."""

    client_id: bytes
    request_id: RequestId
    attempt: int
    prompt: Prompt
    sampling: SamplingParams
    choices: tuple[ChoiceProgress, ...] = ()  # of earlier attempts, by index; empty: nothing has come yet
    priority: int = 0  # lower goes first
    cache_salt: bytes = b""  # only requests with the same one share cached prefixes
    lead: int | None = None  # of the group that has accepted it, in an earlier attempt or in this one
    leads: tuple[int, ...] = ()  # of the groups that know the client: one of them is to run it; empty: of all
    tenant: str = ""  # on whose behalf: see docs/fairness.md; empty: the client's own


class AbortRequest(Message, frozen=True, kw_only=True):
    """client → preprocess → llm: end this; repeated until the terminal message comes."""

    client_id: bytes
    request_id: RequestId
    attempt: int
    index: int | None = None  # of the one choice that is to end; None: all
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


IngestMessage = Hello | SubmitRequest | QueryRequest | AbortRequest

# --- encode.<i>: preprocess and llm rank 0 → vit i
# ------------------------------------------------------------------


class PoolOpened(WorkerMessage, frozen=True, kw_only=True):
    """The sender's pool, once, before any handle of it."""

    pool: PoolInfo


class PoolClosed(WorkerMessage, frozen=True, kw_only=True):
    """The pool of a dead worker is mapped here no longer.

    From llm rank 0 to the ranks: close it, behind the steps before this.
    """

    pool_id: str
    pool_epoch: int


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
    will_follow: bool = False  # the pixels: they are being decoded, and nobody need ask for them
    tenant: str = ""  # whose turn it takes


class CancelEncode(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → vit: nobody wants these any more."""

    keys: tuple[ChunkKey, ...]


class LeaseReleased(WorkerMessage, frozen=True, kw_only=True):
    """llm → vit: these embeddings have been read by every rank."""

    lease_ids: tuple[int, ...]


class LeaseSet(WorkerMessage, frozen=True, kw_only=True):
    """llm → vit, once a second: all leases I hold; one that is missing twice is free, so a lost release
    heals."""

    lease_ids: tuple[int, ...]
    last_lease_id: int  # the latest that has arrived: younger ones may still be under way


class LeaseRequest(WorkerMessage, frozen=True, kw_only=True):
    """llm → vit: a preempted request needs this chunk again.

    Answered with `EmbeddingReady` or `LeaseRefused`.
    """

    key: ChunkKey
    mm_hash: bytes


EncodeMessage = PoolOpened | EncodeRequest | CancelEncode | LeaseReleased | LeaseSet | LeaseRequest

# --- feedback: vits and llm rank 0 → preprocess
# ---------------------------------------------------------------------


class PixelsReleased(WorkerMessage, frozen=True, kw_only=True):
    """vit → preprocess: this chunk needs no pixels (any more): encoded, found in the cache, or cancelled."""

    key: ChunkKey


class EncodeMiss(WorkerMessage, frozen=True, kw_only=True):
    """vit → preprocess: I do not have this chunk, send its pixels."""

    key: ChunkKey


class ItemNotNeeded(WorkerMessage, frozen=True, kw_only=True):
    """llm → preprocess: the prefix cache covers this item; stop fetching, decoding or encoding it."""

    request_id: str
    attempt: int
    item: int


class RequestEnded(WorkerMessage, frozen=True, kw_only=True):
    """llm → preprocess: forget this request's media and give its credit to another."""

    request_id: str
    attempt: int
    is_interrupted: bool = False  # it may come again, and then goes on, be the server full


FeedbackMessage = PixelsReleased | EncodeMiss | ItemNotNeeded | RequestEnded

# --- llm: preprocess and vits → llm rank 0
# --------------------------------------------------------------------------


class MmChunk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chunk and the ViT that the router chose for it."""

    mm_hash: bytes
    num_tokens: int
    vit: int
    vit_epoch: int


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
    """preprocess → llm: a request's metadata, sent before any of its pixels."""

    client_id: bytes
    request_id: str
    attempt: int
    arrival: int
    prompt_token_ids: bytes
    positions: bytes  # int32 [3, prompt]: time, height and width of each token
    position_delta: int  # what a token after the prompt adds to its index
    items: tuple[MmItem, ...]
    sampling: SamplingParams
    choices: tuple[ChoiceProgress, ...] = ()  # of earlier attempts, by index
    priority: int = 0
    cache_salt: bytes = b""
    tenant: str = ""  # whose turn it takes; empty: the client's own


class EmbeddingReady(WorkerMessage, frozen=True, kw_only=True):
    """vit → llm: the embeddings of one chunk are in my pool, leased to you."""

    key: ChunkKey
    lease_id: int
    embeddings: TensorHandle  # [num_tokens, hidden]


class EncodeFailed(WorkerMessage, frozen=True, kw_only=True):
    """vit → llm: this chunk cannot be encoded."""

    key: ChunkKey
    error: ErrorInfo


class LeaseRefused(WorkerMessage, frozen=True, kw_only=True):
    """vit → llm: this chunk is no longer in my cache."""

    key: ChunkKey


class Preparing(WorkerMessage, frozen=True, kw_only=True):
    """preprocess → llm → client: the answer to a query about a request whose media are still on their way."""

    client_id: bytes
    request_id: str
    attempt: int


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
LlmMessage = FromPreprocess | PoolOpened | EmbeddingReady | EncodeFailed | LeaseRefused

# --- steps: llm rank 0 → other ranks
# --------------------------------------------------------------------------------


class EmbeddingSlice(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows [start, start + length) of an embedding go to rows [offset, …) of this sequence's part of the
    step."""

    embeddings: TensorHandle
    start: int
    offset: int
    length: int


class SequenceStart(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence takes a slot of the runner's tables: all that later steps do not repeat.

    Whoever was there is forgotten.
    """

    slot: int
    num_prompt_tokens: int
    sampling: SamplingParams
    token_ids: bytes  # int32: prompt, and output so far
    # int32 [3, num_prompt_tokens]: rows time, height, width; empty: each token's index
    positions: bytes = b""
    position_delta: int = 0  # what a token behind the prompt adds to its index
    num_computed_tokens: int = 0  # already in the KV cache
    block_table: bytes = b""  # int32, so far
    is_masked: bool = False  # its tokens are chosen when `TokenMasks` has said which ones may come


class SequenceStep(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A sequence's share of a step: only what is new. With nothing but its slot it decodes one token."""

    slot: int
    num_tokens: int = 1
    is_sampled: bool = True  # the step yields what comes behind its last token
    new_blocks: bytes = b""  # int32: go behind its block table
    embeddings: tuple[EmbeddingSlice, ...] = ()  # of this part


class StepPlan(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → ranks: compute exactly this next. Numbered without gaps."""

    step: int
    started: tuple[SequenceStart, ...]
    sequences: tuple[SequenceStep, ...]
    is_wide: bool = False  # on all cores: nobody else computes


class TokenMasks(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → ranks: choose the tokens that this step left open. Only the plan of such a step has it
    behind it."""

    step: int
    # Of each sequence that is masked and sampled, in the plan's order: a bit for each token of the
    # vocabulary, the lowest bit of a byte first; empty: any token may come.
    masks: tuple[bytes, ...]


StepsMessage = PoolOpened | PoolClosed | StepPlan | TokenMasks

# --- outputs: llm rank 0 → clients
# ----------------------------------------------------------------------------------


class Welcome(WorkerMessage, frozen=True, kw_only=True):
    """llm → client: you are known; this is the model, and these are your credits."""

    protocol: int
    model_folder: str  # has the tokenizer's files
    tokenizer_hash: bytes  # BLAKE2b, 16 bytes, of tokenizer.json
    model_name: str
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


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Log-probabilities at one output token: of itself first, then of the likeliest ones, best first."""

    token_ids: bytes  # int32
    logprobs: bytes  # float32


class RequestOutput(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """New tokens of one choice; with a `finish_reason` they are its last."""

    request_id: str
    attempt: int
    offset: int  # tokens before these: a gap shows
    new_token_ids: bytes
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of them, where they are wanted
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    index: int = 0  # of the choice


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


OutputsMessage = Welcome | Preparing | Accepted | TokenOutputs | RequestFailed | Interrupted

# --- control: launcher → everyone
# -----------------------------------------------------------------------------------


class WorkerState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: WorkerId
    epoch: int  # its incarnation: an earlier one is dead, reaped, and will never say anything again
    is_ready: bool
    credits: int = 0
    # digests of the requests that were executing in the incarnation before when it died, and had yielded no
    # token there
    executed: tuple[bytes, ...] = ()
    num_open_requests: int = 0
    counters: dict[str, int] = {}  # what it last told, with what it learnt at its start
    silent_s: float = 0.0  # since it last told: some seconds are one long piece of work
    metrics: tuple[Metric, ...] = ()  # what `counters` are, and histograms


class ReloadState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    number: int = 0  # reloads asked for so far
    is_running: bool = False
    refusal: str = ""  # why the last one was refused
    # of the weights, from 0: what has tokens of an earlier one is not submitted again
    generation: int = 0


class PipelineState(Message, frozen=True, kw_only=True):
    """launcher → everyone: all that a worker or a client has to know of the pipeline, at each change, once a
    second, and to each new subscriber: a message that is lost is made up for by the next."""

    workers: tuple[WorkerState, ...]
    leads: tuple[int, ...] = (0,)  # the LLM ranks that lead a group: clients listen to each
    is_draining: bool = False  # nothing new is accepted, and what is open is finished
    # incarnations whose successors serve already: they accept nothing new, finish what is open, and end
    retiring: tuple[tuple[WorkerId, int], ...] = ()
    end: str | None = None  # the pipeline ends now: empty at an orderly end, else which worker died of what
    reload: ReloadState = ReloadState()
    # by role, digests of the requests that were executing in such workers when they died, with no new token
    # since: there each of them runs alone
    quarantined: dict[Role, tuple[bytes, ...]] = {}


ControlMessage = PipelineState

# --- status: everyone → launcher
# ------------------------------------------------------------------------------------


class WorkerReady(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: loaded; what was learnt at run time, and how many requests may be open with me."""

    credits: int = 0
    details: dict[str, int] = {}


class WorkerStats(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: progress of loading, or counts while running. May be dropped."""

    phase: str
    done: int = 0
    total: int = 0
    num_open_requests: int = 0
    counters: dict[str, int] = {}
    metrics: tuple[Metric, ...] = ()  # what they are, and histograms


class FirstTokenYielded(WorkerMessage, frozen=True, kw_only=True):
    """llm rank 0 → launcher: a request that was quarantined has yielded a new token. May be dropped."""

    digest: bytes  # of its id


class WorkerFailed(WorkerMessage, frozen=True, kw_only=True):
    """worker → launcher: I end because of this."""

    error: str


class ReloadRequested(WorkerMessage, frozen=True, kw_only=True):
    """api → launcher: an administrator asks for a reload."""


StatusMessage = ReloadRequested | WorkerReady | WorkerStats | WorkerFailed | PoolClosed | FirstTokenYielded
