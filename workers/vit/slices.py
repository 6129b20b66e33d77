"""How many patches a ViT encodes at once, so that no forward occupies the device longer than a slice.
Pure."""

from __future__ import annotations

import math

WEIGHT = 0.1  # of the newest observation
# variance of the sizes over their mean square: with less, fixed cost and cost per patch cannot be told apart
SPREAD = 0.01


class SliceLimit:
    """Fits the seconds of a forward as a fixed cost plus a cost per patch. Without `slice_s` only
    `max_patches` limits a batch."""

    def __init__(self, max_patches: int, slice_s: float | None) -> None:
        self._max_patches, self._slice_s = max_patches, slice_s
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
        """The fixed cost of a forward and the cost per patch, in seconds."""
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
        """Of one batch. A chunk with more patches is a batch of its own."""
        cost = self._cost()
        if self._slice_s is None or cost is None or cost[1] <= 0:
            return self._max_patches
        fixed, each = cost
        return max(1, min(self._max_patches, int(max(self._slice_s - fixed, self._slice_s / 2) / each)))

    def num_turns(self, num_patches: int) -> int:
        """The number of parts in which a forward of so many patches is run."""
        cost = self._cost()
        if self._slice_s is None or cost is None:
            return 1
        return max(1, math.ceil(num_patches * cost[1] / self._slice_s - 1e-9))
