"""The fewest processes that meet goals for TTFT and ITL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from tools.simulation.pipeline import Size
from tools.simulation.report import Summary

MOST = 64  # processes of a kind


class Goals(NamedTuple):
    """Seconds of the 99th percentile."""

    ttft: float = math.inf
    itl: float = math.inf

    def are_met(self, summary: Summary) -> bool:
        return summary.ttft_p99 <= self.ttft and summary.itl_p99 <= self.itl


class Tried(NamedTuple):
    size: Size
    summary: Summary


class Found(NamedTuple):
    size: Size | None  # None: no number of processes meets the goals
    tried: list[Tried]  # in order


def search(run: Callable[[Size], Summary], goals: Goals, most: int = MOST) -> Found:
    """Fewest groups first, where nothing else is short; then fewest ViTs beside these groups; then fewest
    processes that decode. None of the three numbers can then be less by one, the others being as they are.

    A number is doubled until the goals are met, and then halved towards the last that did not meet them:
    more processes are taken to be no worse.
    """
    tried: dict[Size, Summary] = {}

    def meets(size: Size) -> bool:
        if size not in tried:
            tried[size] = run(size)
        return goals.are_met(tried[size])

    size = Size(most, most, most)
    for name in ("num_groups", "num_vits", "num_readers"):
        number = fewest(lambda count, name=name, size=size: meets(size._replace(**{name: count})), most)  # type: ignore[misc]
        if number is None:
            return Found(None, [Tried(*pair) for pair in tried.items()])
        size = size._replace(**{name: number})
    return Found(size, [Tried(*pair) for pair in tried.items()])


def fewest(meets: Callable[[int], bool], most: int) -> int | None:
    """The least number from 1 to `most` that `meets`; None: none does."""
    low, high = 0, 1  # the largest that is known not to, the next to try
    while not meets(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
