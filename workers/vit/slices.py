"""How much a ViT may take on at once, so that none of its turns on a device lasts longer than it should.

Pure.
"""

from __future__ import annotations

import math

WEIGHT = 0.1  # of the newest observation
# of sizes, beside their square: with less there is no telling a fixed cost from one for each patch
SPREAD = 0.01


class SliceLimit:
    """Learns what a forward costs, and each patch in it, as a line through what was seen.

    Without a limit of time only patches count.
    """

    def __init__(self, max_patches: int, slice_s: float | None) -> None:
        self._most, self._slice_s = max_patches, slice_s
        self._means: tuple[float, float, float, float] | None = None  # of n, t, n², n·t

    def observe(self, num_patches: int, seconds: float) -> None:
        seen = (float(num_patches), seconds, float(num_patches) ** 2, num_patches * seconds)
        old = self._means
        if old is None:
            self._means = seen
        else:
            a, b, c, d = (mean + WEIGHT * (new - mean) for mean, new in zip(old, seen, strict=True))
            self._means = (a, b, c, d)

    def _cost(self) -> tuple[float, float] | None:
        """Seconds of a forward as such, and of each patch."""
        if self._means is None:
            return None
        n, t, nn, nt = self._means
        spread = nn - n * n
        each = (nt - n * t) / spread if spread > SPREAD * nn else 0.0
        if not 0 < each <= t / n:
            each = t / n
        return t - each * n, each

    @property
    def max_patches(self) -> int:
        """Of one batch. A chunk that has more by itself goes alone."""
        cost = self._cost()
        if self._slice_s is None or cost is None or cost[1] <= 0:
            return self._most
        fixed, each = cost
        return max(1, min(self._most, int(max(self._slice_s - fixed, self._slice_s / 2) / each)))

    def num_turns(self, num_patches: int) -> int:
        """In how many parts a forward of so many patches is to be run."""
        cost = self._cost()
        if self._slice_s is None or cost is None:
            return 1
        return max(1, math.ceil(num_patches * cost[1] / self._slice_s - 1e-9))
