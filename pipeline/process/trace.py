"""Traces for `tools/trace.py`: one file for each worker, one line for each piece of work."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from pipeline.wire.topology import WorkerId

FLUSH_S = 0.5


class TraceSpan(msgspec.Struct, frozen=True):
    """Times are seconds of the machine's monotonic clock, the same for all processes."""

    name: str
    start: float
    end: float
    request_ids: tuple[str, ...]
    amount: int = 0  # tokens or patches


class Tracer:
    def __init__(self, folder: str, worker: WorkerId) -> None:
        """Without a folder nothing is written."""
        self._file = (Path(folder) / f"{worker}.jsonl").open("ab") if folder else None
        self._written_at = 0.0

    @property
    def is_on(self) -> bool:
        return self._file is not None

    def span(
        self, name: str, start: float, request_ids: Iterable[str], amount: int = 0, end: float | None = None
    ) -> None:
        """A piece of work that ends now, if no other end is given."""
        if self._file is None:
            return
        now = time.monotonic()
        span = TraceSpan(name, start, now if end is None else end, tuple(dict.fromkeys(request_ids)), amount)
        self._file.write(msgspec.json.encode(span) + b"\n")
        if now - self._written_at > FLUSH_S:
            self._written_at = now
            self._file.flush()

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()
