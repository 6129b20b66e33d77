"""Places in which something is done, for which requests take turns."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import Counter

from pipeline.fair import FairClock


class Places:
    """`count` places; one request alone never has the last of them."""

    def __init__(self, count: int) -> None:
        self._free, self._most = count, max(1, count - 1)
        self._held: Counter[str] = Counter()
        self._turns: FairClock[str] = FairClock()
        self._numbers = itertools.count()
        self._waiting: list[tuple[float, int, str, asyncio.Future[None]]] = []  # a heap

    async def take(self, owner: str) -> None:
        granted = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self._turns.stamp(owner, 1.0), next(self._numbers), owner, granted))
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.free(owner)
            raise

    def free(self, owner: str) -> None:
        self._free += 1
        self._held[owner] -= 1
        if not self._held[owner]:
            del self._held[owner]
        self._grant()

    def _grant(self) -> None:
        passed_over = []
        while self._free and self._waiting:
            entry = heapq.heappop(self._waiting)
            turn, _, owner, granted = entry
            if granted.done():  # cancelled
                continue
            if self._held[owner] >= self._most:
                passed_over.append(entry)
                continue
            self._turns.advance(turn)
            self._free -= 1
            self._held[owner] += 1
            granted.set_result(None)
        for entry in passed_over:
            heapq.heappush(self._waiting, entry)

    @property
    def is_idle(self) -> bool:
        return not self._held and not any(not granted.done() for *_, granted in self._waiting)
