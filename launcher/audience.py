"""Whether somebody looks at the lanes. Pure."""

from __future__ import annotations

import math

MAX_SECONDS = 10.0  # for which one message is believed


class Audience:
    """The api says it again and again; an api that has died is believed for some seconds only."""

    def __init__(self) -> None:
        self._until = -math.inf

    def is_there(self, now: float) -> bool:
        return now < self._until

    def hear(self, seconds: float, now: float) -> bool:
        """The api says that somebody looks for so long. Whether that is news."""
        was_there = self.is_there(now)
        self._until = now + min(max(seconds, 0.0), MAX_SECONDS)
        return self.is_there(now) != was_there
