"""Whose download may begin, and how much downloads may hold: shares that leave room for whoever comes next.

A place is a connection and costs little, but a host that stays silent holds it until the deadline. So
there are many places, few for one request, and no tenant takes the last ones: it may hold as many as are
free, which is half of all when it is alone and 1/(n + 1) each among n (Choudhury and Hahne, "Dynamic queue
length thresholds for shared-memory packet switches", 1998, with alpha = 1). The requests of a tenant share
what is left to it in the same way.

The bytes of unfinished downloads are shared by tenants likewise, but what exceeds a share is refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from workers.preprocess.places import Asker, Places, decrease

MAX_DOWNLOADS = 512
MAX_DOWNLOADS_PER_REQUEST = 16


class DownloadTurns(Places):
    """Use within one event loop."""

    def __init__(self) -> None:
        super().__init__(MAX_DOWNLOADS)

    def _may_take(self, asker: Asker) -> bool:
        of_tenant, of_request = self._num_held_by(asker)
        left = MAX_DOWNLOADS - self._num_held - of_tenant
        return of_request < min(left, MAX_DOWNLOADS_PER_REQUEST)


class BytesInFlight:
    """What downloads have brought so far and nobody holds yet, in memory or in files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_tenant: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, tenant: str) -> Iterator[Callable[[int], bool]]:
        """A function that counts bytes of one download, unless that would be more than the tenant's share."""
        num_bytes = 0

        def count(more: int) -> bool:
            nonlocal num_bytes
            if self._by_tenant[tenant] + more > self._max_bytes - self._by_tenant.total():
                return False
            self._by_tenant[tenant] += more
            num_bytes += more
            return True

        try:
            yield count
        finally:
            decrease(self._by_tenant, tenant, num_bytes)
