"""Places for concurrent work, shared by tenants, and within a tenant by its requests.

A free place goes to the tenant that holds the fewest, within it to the request that holds the fewest, and
among equals to the least recently served. Subclasses limit the places of a tenant and of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import NamedTuple, TypeVar

K = TypeVar("K")


class Asker(NamedTuple):
    """The request, and its tenant, for which work is done."""

    tenant: str
    request_id: str


NOBODY = Asker("", "")


class Places:
    """`count` places; no tenant gets the last one, and no request the last one of its tenant.

    Use within one event loop.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._num_held = 0
        self._held_by_tenant: Counter[str] = Counter()
        self._held_by_request: Counter[Asker] = Counter()
        self._waiting: dict[Asker, deque[asyncio.Future[None]]] = {}  # the least recently served first

    @contextlib.asynccontextmanager
    async def take(self, asker: Asker) -> AsyncIterator[None]:
        """Waits for a place, and holds it."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(asker, deque()).append(turn)
        self._grant()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._release(asker)
            else:
                self._forget(asker, turn)

    @property
    def is_idle(self) -> bool:
        return not self._num_held and not self._waiting

    def check_integrity(self) -> None:
        """To be called when no work is running."""
        assert not self._num_held, f"{self._num_held} places are held by nobody"
        assert not self._held_by_tenant, "a tenant holds places"
        assert not self._held_by_request, "a request holds places"
        assert not self._waiting, "a request waits"

    def _grant(self) -> None:
        while askers := [asker for asker in self._waiting if self._may_take(asker)]:
            asker = min(askers, key=self._num_held_by)
            turns = self._waiting.pop(asker)
            turn = turns.popleft()
            if turns:
                self._waiting[asker] = turns  # at the end
            if turn.cancelled():  # its task has not removed it yet
                continue
            turn.set_result(None)
            self._num_held += 1
            self._held_by_tenant[asker.tenant] += 1
            self._held_by_request[asker] += 1

    def _num_held_by(self, asker: Asker) -> tuple[int, int]:
        return self._held_by_tenant[asker.tenant], self._held_by_request[asker]

    def _may_take(self, asker: Asker) -> bool:
        of_tenant, of_request = self._num_held_by(asker)
        is_free = self._num_held < self._count
        return is_free and of_tenant < max(1, self._count - 1) and of_request < max(1, self._count - 2)

    def _release(self, asker: Asker) -> None:
        self._num_held -= 1
        decrease(self._held_by_tenant, asker.tenant, 1)
        decrease(self._held_by_request, asker, 1)
        self._grant()

    def _forget(self, asker: Asker, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(asker)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[asker]


def decrease(counts: Counter[K], key: K, by: int) -> None:
    counts[key] -= by
    if not counts[key]:
        del counts[key]
