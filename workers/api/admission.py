"""Takes one request in a turn of the event loop, so that a burst of them delays nobody else's answer."""

from __future__ import annotations

import asyncio
from collections import deque


class Admission:
    """First come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()  # while anybody waits, the turn is taken
        self._is_taken = False

    async def wait(self) -> None:
        """Returns when the caller's work may begin: at once, unless other work begins in this turn."""
        if not self._is_taken:
            self._take()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _take(self) -> None:
        self._is_taken = True
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._is_taken = False
        while self._waiting and not self._is_taken:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have left
                turn.set_result(None)
                self._take()
