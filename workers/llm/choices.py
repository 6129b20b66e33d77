"""The choices of one request (the sampling's `n`): a `Request` each, all behind one prompt."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.wire.generation import GenerateRequest
from workers.llm.request import Request, progress_of


@dataclass(slots=True, eq=False)
class Choices:
    """The choices of one request. They share its prompt: the first that is open computes it, the others start
    behind that."""

    client_id: bytes
    request_id: str
    attempt: int
    num_prompt_tokens: int
    mm_hashes: tuple[bytes, ...]
    all: list[Request]  # by index; without those that were over before this attempt
    _is_prompt_computed: bool = False

    @classmethod
    def from_wire(cls, message: GenerateRequest, max_model_len: int) -> Choices:
        first = Request.from_wire(message, max_model_len)
        every = [(index, progress_of(message, index)) for index in range(message.sampling.n)]
        made = cls(
            message.client_id,
            message.request_id,
            message.attempt,
            len(first.prompt_token_ids),
            tuple(item.mm_hash for item in message.items),
            [first.fork(index, progress) for index, progress in every if not progress.is_over],
        )
        if (leader := made.leader) is not None:
            leader.chunks = first.chunks  # whose embeddings are on their way
        for request in made.all:
            request.waits_for_prompt = request is not leader
        return made

    @property
    def open(self) -> list[Request]:
        return [request for request in self.all if not request.is_over]

    @property
    def leader(self) -> Request | None:
        """The first that is open."""
        return next((request for request in self.all if not request.is_over), None)

    def find(self, index: int) -> Request | None:
        return next((request for request in self.all if request.index == index), None)

    @property
    def is_waiting(self) -> bool:
        """Embeddings of its prompt are under way."""
        return any(chunk.is_awaited for request in self.open for chunk in request.chunks)

    def forget_vit(self, vit: int, epoch: int) -> bool:
        """A ViT has died: whether something is missing now."""
        are_hit = [request.forget_vit(vit, epoch) for request in self.open]
        return any(are_hit)

    def on_first_token(self) -> None:
        """A choice has its first token, so the prompt is computed: the others start behind it."""
        self._is_prompt_computed = True
        for request in self.all:
            request.waits_for_prompt = False

    def hand_on(self, ended: Request) -> None:
        """A choice has ended. If it was to compute the prompt, the next one does, with its embeddings."""
        heir = self.leader
        if self._is_prompt_computed or heir is None or heir.index < ended.index:
            return
        heir.waits_for_prompt = False
        heir.chunks, ended.chunks = ended.chunks, []
        for chunk in heir.chunks:
            chunk.is_lost, chunk.is_read = chunk.is_lost or chunk.is_read, False
