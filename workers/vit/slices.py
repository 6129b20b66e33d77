"""How much a ViT may take on at once, so that none of its turns on a device lasts longer than it should. Pure."""

from __future__ import annotations

WEIGHT = 0.3  # of the newest observation


class SliceLimit:
    """Learns how long a patch takes. Without a limit of time only the number of patches counts."""

    def __init__(self, max_patches: int, slice_s: float | None) -> None:
        self._most, self._slice_s = max_patches, slice_s
        self._seconds_per_patch: float | None = None

    def observe(self, num_patches: int, seconds: float) -> None:
        each = seconds / num_patches
        old = self._seconds_per_patch
        self._seconds_per_patch = each if old is None else old + WEIGHT * (each - old)

    @property
    def max_patches(self) -> int:
        """Of one batch. A chunk that has more by itself goes alone."""
        if self._slice_s is None or not self._seconds_per_patch:
            return self._most
        return max(1, min(self._most, int(self._slice_s / self._seconds_per_patch)))

    def num_turns(self, num_patches: int) -> int:
        """In how many parts a forward of so many patches is to be run."""
        if self._slice_s is None or not self._seconds_per_patch:
            return 1
        return max(1, -(-int(num_patches * self._seconds_per_patch * 1e6) // int(self._slice_s * 1e6)))
