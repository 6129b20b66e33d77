"""The flight recorder of a worker: a counter that shows progress, and the digests of the executing requests
that have yielded no token in this worker.

One small file for each worker in the run directory, mapped by the worker and by the launcher, so that it
outlives the worker. The launcher kills a worker whose counter stands still; after a death the digests name
the requests that may have caused it.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import struct
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pipeline.wire.topology import WorkerId

PREFIX = "flight."  # of the files' names
DIGEST_BYTES = 8
NUM_BYTES = 1 << 16
HEADER = struct.Struct("<qqqd")  # moves, number of digests that follow, records with digests, deadline
DEADLINE_AT = 24
MAX_DIGESTS = (NUM_BYTES - HEADER.size) // DIGEST_BYTES


@functools.lru_cache(4096)
def digest_of(request_id: str) -> bytes:
    """Stands for a request where its id would be too long, or is private."""
    return hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()


class FlightRecorder:
    def __init__(self, run_dir: Path, worker: WorkerId) -> None:
        self.path = run_dir / f"{PREFIX}{worker}"
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, NUM_BYTES)
            self._map = mmap.mmap(fd, NUM_BYTES)
        finally:
            os.close(fd)
        self._count, _, self._num_records, _ = HEADER.unpack_from(self._map)

    def clear(self) -> None:
        """A new incarnation begins."""
        HEADER.pack_into(self._map, 0, 0, 0, 0, 0.0)
        self._count = self._num_records = 0

    def move(self) -> None:
        """Counts progress. To be called only at points that a hung worker does not reach."""
        self._count += 1
        struct.pack_into("<q", self._map, 0, self._count)

    def move_in_step(self) -> None:
        """Behind a layer."""
        self.move()

    def expect(self, seconds: float) -> None:
        """A call begins that makes no moves for at most so many seconds; 0: it has ended."""
        struct.pack_into("<d", self._map, DEADLINE_AT, time.monotonic() + seconds if seconds else 0.0)
        if not seconds:
            self.move()

    def record(self, request_ids: Iterable[str]) -> None:
        """Replaces the executing requests. Requests that have yielded a token here are not to be among
        them."""
        digests = [digest_of(request_id) for request_id in request_ids][:MAX_DIGESTS]
        struct.pack_into("<q", self._map, 8, 0)  # a reader sees no digests while they are written
        if digests:
            self._map[HEADER.size : HEADER.size + DIGEST_BYTES * len(digests)] = b"".join(digests)
            self._num_records += 1
            struct.pack_into("<qq", self._map, 8, len(digests), self._num_records)

    @property
    def num_moves(self) -> int:
        count: int = HEADER.unpack_from(self._map)[0]
        return count

    @property
    def deadline(self) -> float:
        """Of a call that makes no moves, by the machine's monotonic clock; 0: no such call."""
        until: float = HEADER.unpack_from(self._map)[3]
        return until

    @property
    def has_worked(self) -> bool:
        """Whether any request has executed in this incarnation."""
        num_records: int = HEADER.unpack_from(self._map)[2]
        return num_records > 0

    def executing(self) -> tuple[bytes, ...]:
        count = min(MAX_DIGESTS, HEADER.unpack_from(self._map)[1])
        data = self._map[HEADER.size : HEADER.size + DIGEST_BYTES * count]
        return tuple(data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES))

    def close(self) -> None:
        self._map.close()


class Executing:
    """Records executing requests for a worker in which they begin and end one by one."""

    def __init__(self, recorder: FlightRecorder) -> None:
        self._recorder = recorder
        self._counts: Counter[str] = Counter()

    def begin(self, request_id: str) -> None:
        self._counts[request_id] += 1
        self._recorder.record(self._counts)

    def end(self, request_id: str) -> None:
        self._counts[request_id] -= 1
        if not self._counts[request_id]:
            del self._counts[request_id]
        self._recorder.record(self._counts)
