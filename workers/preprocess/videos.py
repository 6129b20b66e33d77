"""Files of videos."""

from __future__ import annotations

import itertools
import os
import weakref

_numbers = itertools.count()


class VideoFile:
    """An open, mostly unnamed file; closed with its last reference. `digest`: sha256 of its content."""

    def __init__(self, fd: int, nbytes: int, digest: bytes) -> None:
        self.nbytes, self.digest = nbytes, digest
        self.number = next(_numbers)
        self.path = f"/proc/{os.getpid()}/fd/{fd}"
        weakref.finalize(self, os.close, fd)
