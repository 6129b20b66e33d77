"""A cache of media's hashes and sizes by a client's name or URL. Pure.

Tenants share no entries and cannot evict each other's: each has a share, and when the cache is full, the
tenant with the most entries loses its oldest.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")
MAX_REMEMBERED = 100_000
MAX_SHARE = 20_000  # of one tenant
MAX_TENANTS = 4096


class TenantCache(Generic[V]):
    """Values by tenant and key. The least recently used are evicted first."""

    def __init__(
        self, max_values: int = MAX_REMEMBERED, max_share: int = MAX_SHARE, max_tenants: int = MAX_TENANTS
    ) -> None:  # fmt: skip
        self._max_values, self._max_share, self._max_tenants = max_values, max_share, max_tenants
        self._tenants: OrderedDict[str, OrderedDict[bytes, V]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, tenant: str, key: bytes) -> V | None:
        values = self._tenants.get(tenant)
        if values is None or key not in values:
            return None
        values.move_to_end(key)
        self._tenants.move_to_end(tenant)
        return values[key]

    def put(self, tenant: str, key: bytes, value: V) -> None:
        values = self._tenants.setdefault(tenant, OrderedDict())
        self._tenants.move_to_end(tenant)
        self._count += key not in values
        values[key] = value
        values.move_to_end(key)
        if len(values) > self._max_share:
            self._forget(tenant, 1)
        if len(self._tenants) > self._max_tenants:
            oldest = next(iter(self._tenants))
            self._forget(oldest, len(self._tenants[oldest]))
        if self._count > self._max_values:
            largest = max(self._tenants, key=lambda name: len(self._tenants[name]))
            # Several at once, so that the largest tenant is not searched each time.
            self._forget(largest, 1 + len(self._tenants[largest]) // 64)

    def _forget(self, tenant: str, count: int) -> None:
        values = self._tenants[tenant]
        for _ in range(count):
            values.popitem(last=False)
        self._count -= count
        if not values:
            del self._tenants[tenant]
