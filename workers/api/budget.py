"""The memory budget of all the endpoint's requests, and each client's share of it.

A request takes its part before it allocates. If the budget lacks room, the request waits in turn for
`PATIENCE_S`, then it is refused. One client never takes all: each may hold at most `SHARE` times the free
memory, so that clients with little always find room (dynamic thresholds: Choudhury and Hahne 1998, "Dynamic
Queue Length Thresholds for Shared-Memory Packet Switches").
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import MIB, ApiConfig
from pipeline.process.machine import machine_memory
from pipeline.wire.errors import RequestError

PATIENCE_S = 2.0  # that a request waits for memory
SHARE = 3.0  # a client alone can have three quarters of the budget
NO_ROOM = "the server has no memory left for this request"
MIN_BODIES, MAX_BODIES = 4, 16  # bodies of the largest size that fit the default budget
MACHINE_SHARE = 16  # the default is one part in so many of the machine's memory


@dataclass(slots=True, eq=False)
class _Waiting:
    lease: BudgetLease
    num_bytes: int
    turn: asyncio.Future[None]


class Budget:
    """Belongs to one event loop."""

    def __init__(self, limit: int, patience_s: float = PATIENCE_S) -> None:
        self._limit, self._patience_s = limit, patience_s
        self.num_bytes = 0  # taken
        self._taken: Counter[str] = Counter()  # by owner
        self._waiting: list[_Waiting] = []

    def _has_room(self, owner: str, num_bytes: int) -> bool:
        free = self._limit - self.num_bytes - num_bytes
        return free >= 0 and self._taken[owner] + num_bytes <= SHARE * free

    def take_at_once(self, lease: BudgetLease, num_bytes: int) -> None:
        """Raises RequestError (503) if there is no room for `num_bytes` more now."""
        if not self._has_room(lease.owner, num_bytes):
            raise RequestError(NO_ROOM, status=503)
        self.num_bytes += num_bytes
        self._taken[lease.owner] += num_bytes
        lease.num_bytes += num_bytes

    async def take(self, lease: BudgetLease, num_bytes: int) -> None:
        """Raises RequestError (503) if there is no room for `num_bytes` more within the patience."""
        waiting = _Waiting(lease, num_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._grant()
        if waiting.turn.done():
            return
        try:
            await asyncio.wait([waiting.turn], timeout=self._patience_s)
        finally:
            if not waiting.turn.done():
                self._waiting.remove(waiting)
                self._grant()
        if not waiting.turn.done():
            raise RequestError(NO_ROOM, status=503)

    def give(self, owner: str, num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._taken[owner] -= num_bytes
        if not self._taken[owner]:
            del self._taken[owner]
        self._grant()

    def _grant(self) -> None:
        """Grants waiting requests their memory, each owner's in the order of its requests."""
        blocked: set[str] = set()
        for waiting in list(self._waiting):
            owner = waiting.lease.owner
            if owner in blocked or not self._has_room(owner, waiting.num_bytes):
                blocked.add(owner)
                continue
            self._waiting.remove(waiting)
            self.take_at_once(waiting.lease, waiting.num_bytes)
            waiting.turn.set_result(None)


class BudgetLease:
    """The memory that one request has taken. Given back when the lease is closed and its media are freed."""

    def __init__(self, budget: Budget, owner: str) -> None:
        self._budget, self.owner = budget, owner
        self.num_bytes = 0
        self._num_views = 0
        self._is_closed = False

    async def grow(self, num_bytes: int) -> None:
        """Grows to at least `num_bytes`. Raises RequestError (503) if there is no room."""
        if (more := num_bytes - self.num_bytes) > 0:
            await self._budget.take(self, more)

    def add(self, num_bytes: int) -> None:
        """For what a body refers to, which is known while it is decoded. Raises RequestError (503)."""
        self._budget.take_at_once(self, num_bytes)

    def keep(self, views: Sequence[memoryview]) -> None:
        """Delays giving back until these views are freed: a socket may hold them after the request's end."""
        loop = asyncio.get_running_loop()

        def on_gone() -> None:  # may run in a thread of ZeroMQ
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._drop_view)

        for view in views:
            self._num_views += 1
            weakref.finalize(view, on_gone).atexit = False

    def _drop_view(self) -> None:
        self._num_views -= 1
        self._settle()

    def close(self) -> None:
        self._is_closed = True
        self._settle()

    def _settle(self) -> None:
        if self._is_closed and not self._num_views and self.num_bytes:
            num_bytes, self.num_bytes = self.num_bytes, 0
            self._budget.give(self.owner, num_bytes)


def memory_mib(config: ApiConfig) -> int:
    """The budget for bodies in MiB: the option's value, or a share of the machine's memory."""
    if config.api_memory_mib is not None:
        return config.api_memory_mib
    affordable = machine_memory() // MACHINE_SHARE // MIB
    return max(MIN_BODIES * config.max_request_mib, min(MAX_BODIES * config.max_request_mib, affordable))
