"""Takes so many requests in one turn of the event loop, that a burst of them delays nobody else's answer."""

from __future__ import annotations

import asyncio
from collections import deque

MAX_IN_A_TURN = 1


class Admission:
    """First come, first served."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_taken = 0  # in this turn of the loop
        self._is_turning = False

    async def wait(self) -> None:
        """Returns when the caller's work may begin: at once, unless other work begins in this turn."""
        if self._waiting or self._num_taken >= MAX_IN_A_TURN:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            await turn
            return
        self._num_taken += 1
        self._turn_later()

    def _turn_later(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        self._is_turning, self._num_taken = False, 0
        while self._waiting and self._num_taken < MAX_IN_A_TURN:
            turn = self._waiting.popleft()
            if not turn.done():  # its caller may have left
                turn.set_result(None)
                self._num_taken += 1
        if self._num_taken:
            self._turn_later()
