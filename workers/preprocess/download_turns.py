"""Whose download may begin, and how much downloads may hold: shares that leave room for whoever comes next.

A place is a connection and costs little, but a host that stays silent holds it until the deadline. So
there are many places, few for one request, and no tenant takes the last ones: it may hold as many as are
free, which is half of all when it is alone and 1/(n + 1) each among n (Choudhury and Hahne, "Dynamic queue
length thresholds for shared-memory packet switches", 1998, with alpha = 1). The requests of a tenant share
what is left to it in the same way. A free place goes to the tenant that holds the fewest, there to the
request that holds the fewest, and among equals to the one that was served the longest ago.

The bytes of unfinished downloads are shared by tenants likewise, but what exceeds a share is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

K = TypeVar("K")
MAX_DOWNLOADS = 512
MAX_DOWNLOADS_PER_REQUEST = 16


class Asker(NamedTuple):
    """On whose behalf something is downloaded."""

    tenant: str
    request_id: str


NOBODY = Asker("", "")
asked_by: ContextVar[Asker] = ContextVar("asked_by", default=NOBODY)


class DownloadTurns:
    """Use within one event loop."""

    def __init__(self) -> None:
        self._num_held = 0
        self._held_by_tenant: Counter[str] = Counter()
        self._held_by_request: Counter[Asker] = Counter()
        self._waiting: dict[Asker, deque[asyncio.Future[None]]] = {}  # the longest not served first

    @contextlib.asynccontextmanager
    async def take(self, asker: Asker) -> AsyncIterator[None]:
        """A place, once it is the asker's turn."""
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

    def check_integrity(self) -> None:
        """When nothing is downloaded."""
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
                self._waiting[asker] = turns  # behind all others
            if turn.cancelled():  # its task has yet to hear of it
                continue
            turn.set_result(None)
            self._num_held += 1
            self._held_by_tenant[asker.tenant] += 1
            self._held_by_request[asker] += 1

    def _num_held_by(self, asker: Asker) -> tuple[int, int]:
        return self._held_by_tenant[asker.tenant], self._held_by_request[asker]

    def _may_take(self, asker: Asker) -> bool:
        free = MAX_DOWNLOADS - self._num_held
        left = free - self._held_by_tenant[asker.tenant]
        return self._held_by_request[asker] < min(left, MAX_DOWNLOADS_PER_REQUEST)

    def _release(self, asker: Asker) -> None:
        self._num_held -= 1
        _decrease(self._held_by_tenant, asker.tenant, 1)
        _decrease(self._held_by_request, asker, 1)
        self._grant()

    def _forget(self, asker: Asker, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(asker)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[asker]


class BytesInFlight:
    """What downloads have brought so far and nobody holds yet, in memory or in files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_tenant: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, tenant: str) -> Iterator[Callable[[int], bool]]:
        """A function that counts bytes of one download, unless that would be more than the tenant's share."""
        num_bytes = 0

        def count(more: int) -> bool:
            nonlocal num_bytes
            if self._by_tenant[tenant] + more > self._max_bytes - self._by_tenant.total():
                return False
            self._by_tenant[tenant] += more
            num_bytes += more
            return True

        try:
            yield count
        finally:
            _decrease(self._by_tenant, tenant, num_bytes)


def _decrease(counts: Counter[K], key: K, by: int) -> None:
    counts[key] -= by
    if not counts[key]:
        del counts[key]
