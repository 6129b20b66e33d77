"""Copies of the layers' states at the ends of prefixes: which place holds which prefix's. Pure, no tensors.

A prefix has the hash of its last block as its name (`Request.block_hashes`). A place is reserved when a step
is planned that ends at such a prefix, and can be found once the step has run. The least recently used
snapshot makes room, those at frames of videos before all others: a video has many, and few chats share them.

A plan restores states before it computes and saves states after it, and plans run in order. So a place may be
reserved for the plan that still restores from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class Snapshots:
    """`num_places` places for the states of one sequence each."""

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._free = list(range(num_places - 1, -1, -1))
        self._reserved: set[int] = set()
        # Places by prefix, least recently used first.
        self._frames: OrderedDict[bytes, int] = OrderedDict()
        self._others: OrderedDict[bytes, int] = OrderedDict()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._others or digest in self._frames

    def __len__(self) -> int:
        return len(self._others) + len(self._frames)

    @property
    def num_free(self) -> int:
        """Places that can be reserved."""
        return self.num_places - len(self._reserved)

    def longest_boundary(self, hashes: Sequence[bytes]) -> int:
        """The number of leading blocks up to the last one with a snapshot behind it; 0 without any."""
        return next((count for count in range(len(hashes), 0, -1) if hashes[count - 1] in self), 0)

    def use(self, digest: bytes) -> int:
        """The place of a prefix, which is the most recently used one now."""
        kind = self._frames if digest in self._frames else self._others
        kind.move_to_end(digest)
        return kind[digest]

    @property
    def has_free_place(self) -> bool:
        return bool(self._free)

    def reserve(self) -> int | None:
        """A place to save a state to; another snapshot may lose it. None if all places are reserved."""
        if not self._free:
            kind = self._frames or self._others
            if not kind:
                return None
            self._free.append(kind.popitem(last=False)[1])
        place = self._free.pop()
        self._reserved.add(place)
        return place

    def publish(self, place: int, digest: bytes, is_frame: bool) -> bool:
        """The step that saves to a reserved place has run. Returns whether the place was taken: a prefix that
        has a snapshot already keeps it.
        """
        if digest in self:
            self.release(place)
            self.use(digest)
            return False
        self._reserved.remove(place)
        (self._frames if is_frame else self._others)[digest] = place
        return True

    def release(self, place: int) -> None:
        """A reserved place is not needed."""
        self._reserved.remove(place)
        self._free.append(place)

    def forget(self, digest: bytes) -> None:
        """A prefix that nobody will ask for. It may have lost its place already."""
        for kind in (self._frames, self._others):
            if (place := kind.pop(digest, None)) is not None:
                self._free.append(place)

    def check_integrity(self) -> None:
        places = [*self._free, *self._reserved, *self._frames.values(), *self._others.values()]
        assert sorted(places) == list(range(self.num_places)), "a place is lost or used twice"
        assert not self._frames.keys() & self._others.keys(), "a prefix has two places"

    def check_idle(self) -> None:
        """No step is under way: no place may be reserved."""
        assert not self._reserved, "places are reserved for no step"
