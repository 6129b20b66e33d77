"""The choices of one request (the sampling's `n`): a `Request` each, with one shared prompt."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from pipeline.wire.generation import GenerateRequest
from pipeline.wire.topology import WorkerId
from pipeline.wire.trace_context import Trace
from workers.llm.chunk import Lease
from workers.llm.request import WITHOUT_ADAPTER, AdapterKey, Request, progress_of


@dataclass(slots=True, eq=False)
class Choices:
    """The choices of one request. The first open choice computes their shared prompt, then the others
    start."""

    client_id: bytes
    request_id: str
    attempt: int
    num_prompt_tokens: int
    mm_hashes: tuple[bytes, ...]
    all: list[Request]  # by index; without choices that were over before this attempt
    told_prompt: bytes = b""  # the prompt's token ids, if the client asked for them
    trace: Trace = msgspec.UNSET

    @classmethod
    def from_wire(
        cls, message: GenerateRequest, max_model_len: int, adapter: AdapterKey = WITHOUT_ADAPTER
    ) -> Choices:
        first = Request.from_wire(message, max_model_len, adapter)
        every = [(index, progress_of(message, index)) for index in range(message.sampling.n)]
        made = cls(
            message.client_id,
            message.request_id,
            message.attempt,
            len(first.prompt_token_ids),
            tuple(item.mm_hash for item in message.items),
            [first.fork(index, progress) for index, progress in every if not progress.is_over],
            message.prompt_token_ids if message.sampling.returns_prompt else b"",
            message.trace,
        )
        if (leader := made.leader) is not None:
            leader.chunks = first.chunks  # their embeddings are under way
        for request in made.all:
            request.waits_for_prompt = request is not leader
        return made

    @property
    def open(self) -> list[Request]:
        return [request for request in self.all if not request.is_over]

    @property
    def leader(self) -> Request | None:
        """The first open choice."""
        return next((request for request in self.all if not request.is_over), None)

    def find(self, index: int) -> Request | None:
        return next((request for request in self.all if request.index == index), None)

    @property
    def is_waiting(self) -> bool:
        """Embeddings of its prompt are under way."""
        return any(chunk.is_awaited for request in self.open for chunk in request.chunks)

    def forget_source(self, worker: WorkerId, epoch: int) -> bool:
        """A ViT or a carrier has died. Returns whether a choice needs embeddings from there."""
        are_hit = [request.forget_source(worker, epoch) for request in self.open]
        return any(are_hit)

    def keep_chunks_behind(self, num_tokens: int) -> None:
        """Keeps the leases of chunks that reach behind the prompt's first `num_tokens`, which the KV cache
        shares: the other choices compute the rest of the prompt from the embeddings again."""
        leader = self.leader
        for chunk in leader.chunks if leader is not None and len(self.all) > 1 else ():
            chunk.is_kept = chunk.stop > num_tokens

    def on_first_token(self, first: Request) -> list[tuple[Lease, int]]:
        """A choice has its first token, so the prompt is computed: the other choices start.

        They get the kept embeddings. Returns these leases, which `first` no longer holds, each with the
        number of other choices that hold it now.
        """
        others = [request for request in self.open if request is not first]
        for request in others:
            request.waits_for_prompt, request.are_others_ahead = False, True
        handed_on: list[tuple[Lease, int]] = []
        for place, chunk in enumerate(first.chunks):
            if chunk.is_kept and chunk.lease is not None:
                for other in (request.chunks[place] for request in others):
                    other.embeddings, other.lease, other.is_lost = chunk.embeddings, chunk.lease, False
                handed_on.append((chunk.lease, len(others)))
                chunk.embeddings = chunk.lease = None
            chunk.is_kept = False
        return handed_on

    def hand_on(self, ended: Request) -> None:
        """A choice has ended. If it was to compute the prompt, the next choice takes over with its chunks."""
        heir = self.leader
        if heir is None or not heir.waits_for_prompt:
            return
        heir.waits_for_prompt = False
        heir.chunks, ended.chunks = ended.chunks, []
        heir.prompt_scores = ended.prompt_scores
        for chunk in heir.chunks:
            is_here = chunk.embeddings is not None
            chunk.is_lost, chunk.is_read = not is_here and (chunk.is_lost or chunk.is_read), False
