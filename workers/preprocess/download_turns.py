"""The turns of downloads, and the bytes that they may hold: shares that leave room for a new tenant.

A place is a connection and costs little, but a silent host holds it until the deadline. So there are many
places, few for each request, and a tenant may hold as many as are free: half of all when it is alone,
1/(n + 1) each among n (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet
switches", 1998, with alpha = 1). The requests of a tenant share its part in the same way.

Tenants share the bytes of unfinished downloads likewise, but bytes beyond a share are refused.
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
    """The bytes of unfinished downloads, in memory or in files."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_tenant: Counter[str] = Counter()

    @contextlib.contextmanager
    def counted(self, tenant: str) -> Iterator[Callable[[int], bool]]:
        """A function that counts bytes of one download, or returns False beyond the tenant's share."""
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
