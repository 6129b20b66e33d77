"""Quarantined requests: they were executing in a worker that died, and have yielded no new token since. In
that worker's role each runs alone, so that a request that kills a worker ends no other requests again. Pure.

The launcher keeps the list because it outlives every worker, and because clients could lie about theirs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from pipeline.wire.topology import Role

QUARANTINE_S = 600.0  # after the last such death, for requests that never yield a token
MAX_QUARANTINED = 1024  # digests, of all roles together: some 10 KiB in each `PipelineState`


class QuarantineRecord:
    """Requests are known by their digests. Times are seconds of any steady clock."""

    def __init__(self) -> None:
        self._died_at: dict[tuple[Role, bytes], float] = {}  # oldest first

    def add(self, role: Role, digests: Iterable[bytes], now: float) -> None:
        """Requests that were executing in a worker of this role at its death. Drops the oldest first."""
        for digest in digests:
            self._died_at.pop((role, digest), None)
            self._died_at[role, digest] = now
        while len(self._died_at) > MAX_QUARANTINED:
            del self._died_at[next(iter(self._died_at))]

    def clear(self, digest: bytes) -> None:
        """The request has yielded a new token: it leaves the quarantine of every role."""
        for role in Role:
            self._died_at.pop((role, digest), None)

    def quarantined(self, now: float) -> dict[Role, tuple[bytes, ...]]:
        """As in `PipelineState`; drops digests older than `QUARANTINE_S`."""
        found: dict[Role, list[bytes]] = defaultdict(list)
        for (role, digest), died_at in list(self._died_at.items()):
            if now - died_at >= QUARANTINE_S:
                del self._died_at[role, digest]
            else:
                found[role].append(digest)
        return {role: tuple(digests) for role, digests in found.items()}
