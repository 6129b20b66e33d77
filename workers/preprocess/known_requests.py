"""The requests that preprocess knows: open requests, with their credits, and ended ones."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pipeline.wire.base import ChunkKey
from pipeline.wire.generation import RequestRefused
from workers.preprocess.credits import Credits

MEMORY_OF_ENDED_S = 60.0
MAX_REMEMBERED = 1 << 16  # requests, open and ended


@dataclass(slots=True)
class KnownRequest:
    client_id: bytes
    request_id: str
    attempt: int
    tenant: str
    task: asyncio.Task[None] | None = None
    was_passed_on: bool = False  # `GenerateRequest` was sent to the LLM
    refusal: RequestRefused | None = None  # if it was refused; kept to answer queries
    keys: list[ChunkKey] = field(default_factory=list)
    num_held_bytes: int = 0
    has_credit: bool = False
    # This attempt or an earlier one was admitted and then at most interrupted: the next attempt is admitted
    # even if the server is full.
    was_begun: bool = False
    lead: int | None = None  # of the group that runs it, once chosen
    leads: tuple[int, ...] = ()  # of the groups that know its client
    num_new_tokens: int = 0  # counted as outstanding in that group
    arrived_at: float = 0.0  # its first attempt, as far as this process knows: seconds of the monotonic clock
    ended_at: float | None = None


class KnownRequests:
    def __init__(self, credits: Credits) -> None:
        self.credits = credits
        self.num_open = 0
        self._by_id: dict[str, KnownRequest] = {}  # the ended ones in the order of their end

    def __iter__(self) -> Iterator[KnownRequest]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> KnownRequest | None:
        return self._by_id.get(request_id)

    def of(self, request_id: str) -> KnownRequest:
        return self._by_id[request_id]

    def add(self, opened: KnownRequest) -> None:
        self._by_id[opened.request_id] = opened
        self.num_open += 1

    def take_credit(self, opened: KnownRequest) -> None:
        """Raises RequestError where the server, or the tenant's share, is full. A request that was begun may
        exceed the limits.
        """
        self.credits.open(opened.tenant, opened.was_begun)
        opened.has_credit = opened.was_begun = True

    def hold(self, opened: KnownRequest, num_bytes: int) -> None:
        """Counts texts and encoded media of a request until it ends.

        Raises RequestError where they exceed the limits.
        """
        if opened.has_credit:
            opened.num_held_bytes += num_bytes
            self.credits.hold(opened.tenant, num_bytes)

    def end(self, opened: KnownRequest, now: float) -> None:
        opened.ended_at = now
        self.num_open -= 1
        if opened.has_credit:
            self.credits.close(opened.tenant, opened.num_held_bytes)
            opened.has_credit, opened.num_held_bytes = False, 0
        if opened.task is not None:
            opened.task.cancel()
            opened.task = None
        self._by_id[opened.request_id] = self._by_id.pop(opened.request_id)

    def forget(self, now: float, has_chunks: Callable[[str], bool]) -> None:
        """Drops requests that ended long ago, once no chunk's key has their id."""
        for opened in list(self._by_id.values()):
            if opened.ended_at is None or has_chunks(opened.request_id):
                continue
            if len(self._by_id) > MAX_REMEMBERED or now - opened.ended_at > MEMORY_OF_ENDED_S:
                del self._by_id[opened.request_id]

    def check_empty(self) -> None:
        num_held = self.credits.num_requests + self.credits.num_held_bytes
        assert not num_held, "credits are held by nobody"
