"""What a worker is doing, in memory that outlives it: a sign that it moves on, and which requests execute in
it right now and have yielded no token there.

The launcher reads it: a worker that stands still is killed, and after a death it is known which requests may
have been the cause. One small file a worker in the run directory, mapped by the worker and by the launcher.
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
HEADER = struct.Struct("<qqqd")  # signs of life, digests that follow, times that there were any, deadline
DEADLINE_AT = 24
MAX_DIGESTS = (NUM_BYTES - HEADER.size) // DIGEST_BYTES


@functools.lru_cache(4096)
def digest_of(request_id: str) -> bytes:
    """What a request is called where its id would be too long, or is nobody else's business."""
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
        """A sign of life: to be given where a worker gets only while it moves on."""
        self._count += 1
        struct.pack_into("<q", self._map, 0, self._count)

    def expect(self, seconds: float) -> None:
        """No sign of life is to be expected within so many seconds, since a call is under way that gives
        none; 0: it is over."""
        struct.pack_into("<d", self._map, DEADLINE_AT, time.monotonic() + seconds if seconds else 0.0)
        if not seconds:
            self.move()

    def record(self, request_ids: Iterable[str]) -> None:
        """These execute from now on, and nobody else who might be the cause of a death: not recorded is who
        has yielded a token here."""
        digests = [digest_of(request_id) for request_id in request_ids][:MAX_DIGESTS]
        struct.pack_into("<q", self._map, 8, 0)  # whoever reads it half written reads nothing
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
        """Until when (of the machine's monotonic clock) a call may go on that gives no sign of life; 0: there
        is none."""
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
    """The requests that execute, for a worker in which they begin and end one by one."""

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
