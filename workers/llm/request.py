"""A request inside the engine: its tokens, their hashes, its embeddings, its progress.

Each choice of a request (the sampling's `n`) is a `Request` of its own; see `choices.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.wire.clients import ChoiceProgress, MediaTokens, TokenLogprobs
from pipeline.wire.generation import GenerateRequest, MmItem, Span
from pipeline.wire.packing import Int32Array, pack_int32, unpack_int32
from pipeline.wire.sampling import FinishReason, SamplingParams
from pipeline.wire.steps import EmbeddingSlice
from pipeline.wire.topology import WorkerId
from workers.llm.cache.boundaries import Boundary
from workers.llm.chunk import Chunk, Lease, chunks_of
from workers.llm.sampling.matching import Matcher
from workers.llm.sampling.tokens import PromptScores

MAX_OVERTAKEN = 8  # a request overtaken this often by priority goes before all priorities
# Tokens of a text before an embedding that is under way: less is not worth a step of its own, which reads all
# weights and takes the cores from the encoder.
MIN_TEXT_PART = 64
AGED = -(2**31) - 1  # the rank of such a request: below every priority


class AdapterKey(NamedTuple):
    """What a request's adapter is to the engine."""

    number: int = -1  # -1: none
    digest: bytes = b""  # of its files: keys and values of other adapters are of no use


WITHOUT_ADAPTER = AdapterKey()


class _KvRun(NamedTuple):
    """A run of placeholders, and what its KV depends on."""

    span: Span
    row: int  # the item's row at which the run begins
    kv_hash: bytes  # of the item


def _num_before(chunk: Chunk, stop: int) -> int:
    """How many of a chunk's placeholders are among the first `stop` tokens of the prompt."""
    return sum(max(0, min(piece.stop, stop) - piece.offset) for piece in chunk.pieces)


@dataclass(slots=True, eq=False)  # compared by identity, so that queues do not compare arrays
class Request:
    """One choice of a request."""

    client_id: bytes
    request_id: str
    attempt: int
    arrival: int
    prompt_token_ids: list[int]
    positions: Int32Array  # [3, prompt]
    position_delta: int  # added to the index of a token after the prompt
    chunks: list[Chunk]
    items: tuple[MmItem, ...]
    sampling: SamplingParams
    max_tokens: int
    index: int = 0  # of the choice
    waits_for_prompt: bool = False  # another choice of the request computes their shared prompt
    waits_for_matchers: bool = False  # a thread starts them
    are_others_ahead: bool = False  # another choice has yielded a token in this attempt
    priority: int = 0  # lower goes first
    cache_salt: bytes = b""  # only requests with the same salt share cached prefixes
    adapter: AdapterKey = WITHOUT_ADAPTER
    tenant: str = ""  # whose share of slots, blocks and time it uses
    # In seconds of the monotonic clock; 0: not yet.
    arrived_at: float = 0.0  # its first attempt, in preprocess
    queued_at: float = 0.0
    started_at: float = 0.0  # admitted for the first time
    first_token_at: float = 0.0  # of this attempt
    last_token_at: float = 0.0
    num_earlier_tokens: int = 0  # output tokens of earlier attempts
    output_token_ids: list[int] = field(default_factory=list)
    # One an output token, where requested; empty for tokens of earlier attempts.
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_scores: list[PromptScores] = field(default_factory=list)  # so far, if requested
    num_computed_tokens: int = 0  # in the KV cache, or being computed by an in-flight step
    num_pending_tokens: int = 0  # 1 while an in-flight step samples a token
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_published_blocks: int = 0
    slot: int = -1  # its place in the runner's tables while it runs
    block_table: list[int] = field(default_factory=list)
    boundaries: Sequence[Boundary] = ()  # of its prompt, at which its state is saved
    answer_snapshot: bytes = b""  # the prefix of the newest snapshot behind its prompt
    num_sent_blocks: int = 0  # blocks of its table that the runner has
    matchers: tuple[Matcher, ...] = ()  # restrict its next token
    draft_masks: Sequence[bytes] = ()  # with matchers: of the tokens behind each draft of the next step
    finish_reason: FinishReason | None = None
    was_admitted: bool = False
    num_overtaken: int = 0  # by requests with a better priority
    is_over: bool = False  # results of an in-flight step are dropped
    _media_tokens: MediaTokens | None = None
    _block_hashes: list[bytes] = field(default_factory=list)

    @classmethod
    def from_wire(
        cls, message: GenerateRequest, max_model_len: int, adapter: AdapterKey = WITHOUT_ADAPTER
    ) -> Request:
        prompt = unpack_int32(message.prompt_token_ids).tolist()
        positions = unpack_int32(message.positions).reshape(3, len(prompt))
        chunks = [chunk for number, item in enumerate(message.items) for chunk in chunks_of(number, item)]
        room = max_model_len - len(prompt)
        asked = message.sampling.max_tokens
        made = cls(
            client_id=message.client_id, request_id=message.request_id, attempt=message.attempt,
            arrival=message.arrival,
            prompt_token_ids=prompt, positions=positions, position_delta=message.position_delta,
            chunks=chunks, items=message.items,
            sampling=message.sampling, priority=message.priority,
            cache_salt=message.cache_salt, adapter=adapter,
            max_tokens=room if asked is None else min(asked, room),
            tenant=message.tenant or message.client_id.hex(),
            arrived_at=message.arrived_at,
        )  # fmt: skip
        made.go_on_behind(progress_of(message, 0))
        return made

    def fork(self, index: int, progress: ChoiceProgress) -> Request:
        """Another choice with the same prompt.

        Like a preempted request it has no embeddings: those that the prefix cache does not cover are leased
        again.
        """
        lost = [Chunk(one.item, one.index, one.pieces, one.wire, is_lost=True) for one in self.chunks]
        made = dataclasses.replace(
            self,
            index=index,
            chunks=lost,
            block_table=[],
            _block_hashes=[],
            prompt_scores=[],
            _media_tokens=None,
        )
        made.go_on_behind(progress)
        return made

    def go_on_behind(self, progress: ChoiceProgress) -> None:
        """Takes over the tokens of earlier attempts. The client has their logprobs."""
        self.output_token_ids = unpack_int32(progress.output_token_ids).tolist()
        self.num_earlier_tokens = len(self.output_token_ids)
        has_logprobs = self.sampling.logprobs is not None
        self.logprobs = [TokenLogprobs(b"", b"")] * self.num_earlier_tokens if has_logprobs else []

    def media_tokens(self) -> MediaTokens | None:
        """Where the embeddings of the prompt's items came from, if it has any. To be asked with its first
        token or later, when all embeddings have been read."""
        if self._media_tokens is None and self.chunks:
            prefix = [_num_before(chunk, self.num_cached_tokens) for chunk in self.chunks]
            rest = [chunk.wire.num_tokens - known for chunk, known in zip(self.chunks, prefix, strict=True)]
            encoded = sum(num for chunk, num in zip(self.chunks, rest, strict=True) if chunk.was_encoded)
            self._media_tokens = MediaTokens(encoded, sum(rest) - encoded, sum(prefix))
        return self._media_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether a client waits for them. With a token of an earlier attempt it has got them."""
        return self.sampling.prompt_logprobs is not None and not self.num_earlier_tokens

    def take_prompt_scores(self, scores: PromptScores) -> None:
        """Keeps what is new: a preempted request computes its prompt again."""
        num_known = 1 + sum(len(part.ranks) for part in self.prompt_scores)
        num_old = num_known - scores.start
        if 0 <= num_old < len(scores.ranks):
            start, ids, logprobs, ranks = scores
            new = PromptScores(start + num_old, ids[num_old:], logprobs[num_old:], ranks[num_old:])
            self.prompt_scores.append(new)

    @property
    def key(self) -> tuple[str, int]:
        """The owner's name of its blocks and its slot."""
        return self.request_id, self.index

    @property
    def is_held(self) -> bool:
        """It must not be admitted yet."""
        return self.waits_for_prompt or self.waits_for_matchers

    @property
    def order(self) -> tuple[int, int]:
        """Requests with a lower order go first."""
        return AGED if self.is_aged else self.priority, self.arrival

    @property
    def is_aged(self) -> bool:
        return self.num_overtaken >= MAX_OVERTAKEN

    @property
    def has_progress(self) -> bool:
        """The choice, or another choice of its request, has yielded a token in this attempt."""
        return self.are_others_ahead or len(self.output_token_ids) > self.num_earlier_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output, with the token that an in-flight step is about to yield."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_remaining_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def is_last_token_pending(self) -> bool:
        """All output tokens up to `max_tokens` are here or being sampled."""
        return len(self.output_token_ids) + self.num_pending_tokens >= self.max_tokens

    @property
    def max_num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.max_tokens

    def is_waiting_for_embeddings(self, num_computed_tokens: int) -> bool:
        """Whether embeddings behind the first `num_computed_tokens` have never arrived.

        Embeddings lost in a preemption do not count: they come back at once or, if they are gone, the request
        is interrupted.
        """
        return any(
            chunk.embeddings is None and not chunk.is_lost and chunk.stop > num_computed_tokens
            for chunk in self.chunks
        )

    def num_ready_tokens(self) -> int:
        """Tokens from the start that can be computed: up to the first placeholder whose embedding has not
        arrived."""
        if self.num_computed_tokens < len(self.prompt_token_ids):
            for chunk in self.chunks:
                if chunk.embeddings is None:
                    for piece in chunk.pieces:
                        if piece.stop > self.num_computed_tokens:
                            return piece.offset
        return self.num_tokens

    def boundaries_within(self, start: int, stop: int) -> list[int]:
        """Positions of those behind the tokens [start, stop), one or more of them."""
        first, last = (bisect_right(self.boundaries, place, key=_position_of) for place in (start, stop))
        return [boundary.position for boundary in self.boundaries[first:last]]

    def boundary_at(self, position: int) -> Boundary | None:
        index = bisect_left(self.boundaries, position, key=_position_of)
        found = self.boundaries[index] if index < len(self.boundaries) else None
        return found if found is not None and found.position == position else None

    def is_short_text(self, stop: int) -> bool:
        """Whether the uncomputed tokens before `stop`, the first that must wait for an embedding, are a short
        text. Embeddings that are here are no text: they are computed, so that their leases are released."""
        start = self.num_computed_tokens
        if stop == self.num_tokens or stop - start >= MIN_TEXT_PART:
            return False
        return not any(
            chunk.embeddings is not None and chunk.stop > start and chunk.pieces[0].offset < stop
            for chunk in self.chunks
        )

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Hashes of the first blocks: sha256 over the hash of the block before, the token ids, and the items
        in the block.

        Placeholders are all the same token: `kv_hash` and the row in the item tell them apart. `kv_hash`
        covers all that the item's KV depends on, positions included.
        """
        hashes = self._block_hashes
        runs = _runs_of(self.items) if len(hashes) < num_blocks else []
        while len(hashes) < num_blocks:
            start, stop = len(hashes) * block_size, (len(hashes) + 1) * block_size
            digest = hashlib.sha256(hashes[-1] if hashes else self._first_hash())
            digest.update(pack_int32(self.token_ids(start, stop)))
            # A long video has hundreds of runs: those before the block are skipped.
            for run in runs[bisect_right(runs, start, key=_stop_of) :]:
                first, last = max(start, run.span.offset), min(stop, run.span.stop)
                if first >= last:
                    break
                place = first - start, last - first, run.row + first - run.span.offset
                digest.update(struct.pack("<qqqq", *place, len(run.kv_hash)) + run.kv_hash)
            hashes.append(digest.digest())
        return hashes[:num_blocks]

    def _first_hash(self) -> bytes:
        """Before any block: of whom the request shares with. No salt makes another adapter's."""
        if self.adapter.digest:
            return hashlib.blake2b(self.cache_salt, key=self.adapter.digest, digest_size=32).digest()
        return hashlib.sha256(self.cache_salt).digest()

    def token_ids(self, start: int, stop: int) -> list[int]:
        prompt = len(self.prompt_token_ids)
        return (
            self.prompt_token_ids[start:stop]
            + self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]
        )

    def embedding_slices(self, start: int, stop: int) -> tuple[EmbeddingSlice, ...]:
        """The slices of embeddings that fill placeholders among tokens [start, stop)."""
        slices: list[EmbeddingSlice] = []
        for chunk in self.chunks:
            for piece in chunk.pieces:
                first, last = max(start, piece.offset), min(stop, piece.stop)
                if first < last:
                    assert chunk.embeddings is not None
                    row = piece.row + first - piece.offset
                    slices.append(EmbeddingSlice(chunk.embeddings, row, first - start, last - first))
        return tuple(slices)

    def take_read_leases(self, num_tokens: int) -> list[Lease]:
        """Takes the leases of the chunks within the first `num_tokens`, which have been computed. Each lease
        is returned once."""
        done: list[Lease] = []
        for chunk in self.chunks:
            if chunk.stop <= num_tokens:
                chunk.is_read = True
                if chunk.is_kept:
                    continue
                if chunk.lease is not None:
                    done.append(chunk.lease)
                chunk.lease = chunk.embeddings = None
        return done

    def start_over(self) -> None:
        """The request is preempted and will be recomputed.

        The caller releases its leases, as other requests may need the pool slots.
        """
        self.num_computed_tokens = self.num_published_blocks = 0
        self.block_table, self.slot = [], -1
        for chunk in self.chunks:
            chunk.is_lost = chunk.is_lost or chunk.is_read or chunk.lease is not None
            chunk.is_read = False

    def forget_source(self, worker: WorkerId, epoch: int) -> bool:
        """A ViT or a carrier has died: drops the embeddings in its pool that were not read. `epoch` is its
        successor's.

        Returns whether the request needs embeddings from there, or waits for some that were to pass.
        """
        is_hit = False
        for chunk in self.chunks:
            if chunk.lease is not None and chunk.lease.owner == worker and chunk.lease.epoch < epoch:
                chunk.lease = chunk.embeddings = None
                is_hit = True
            elif chunk.is_awaited and chunk.wire.is_lost_with(worker, epoch):
                is_hit = True
        return is_hit

    def take_all_leases(self) -> list[Lease]:
        leases = [chunk.lease for chunk in self.chunks if chunk.lease is not None]
        for chunk in self.chunks:
            chunk.lease = chunk.embeddings = None
        return leases


def progress_of(message: GenerateRequest, index: int) -> ChoiceProgress:
    return message.choices[index] if index < len(message.choices) else ChoiceProgress()


def _runs_of(items: Sequence[MmItem]) -> list[_KvRun]:
    """In the order of the prompt."""
    runs: list[_KvRun] = []
    for item in items:
        row = 0
        for span in item.spans:
            runs.append(_KvRun(span, row, item.kv_hash))
            row += span.length
    return runs


def _position_of(boundary: Boundary) -> int:
    return boundary.position


def _stop_of(run: _KvRun) -> int:
    return run.span.stop
