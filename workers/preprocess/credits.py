"""Limits for each tenant: open requests, and the bytes of their texts and media. Pure.

The limits are dynamic thresholds (A. Choudhury and E. Hahne, "Dynamic queue length thresholds for
shared-memory packet switches", 1998): a tenant may hold at most `SHARE` times the free amount. So a lone
tenant gets nearly all, there is always room for a new tenant, and each further tenant lowers the limit of
all.
"""

from __future__ import annotations

from collections import Counter

from pipeline.config import MIB
from pipeline.config.preprocess import MAX_OVERLOAD
from pipeline.wire.errors import RequestError

SHARE = 7  # a lone tenant has 7/8; n tenants have 7 / (7 n + 1) each


class Shares:
    """A limited amount, and how much of it each tenant holds."""

    def __init__(self, limit: int, has_overload: bool = False) -> None:
        """`has_overload`: an amount of a tenant beyond `max_alone` does not reduce the free amount."""
        self.limit, self._has_overload = limit, has_overload
        # The limit of a lone tenant.
        self.max_alone = max(1, limit - max(1, limit // (SHARE + 1)))
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._held.total()

    def held(self, tenant: str) -> int:
        return self._held[tenant]

    @property
    def free(self) -> int:
        if not self._has_overload:
            return self.limit - self.total
        return self.limit - sum(min(held, self.max_alone) for held in self._held.values())

    def fits(self, tenant: str, amount: int) -> bool:
        """A tenant that holds nothing may have all that is free."""
        held, left = self._held[tenant], self.free - amount
        return left >= 0 and (not held or held + amount <= SHARE * left)

    def is_above_share(self, tenant: str, amount: int) -> bool:
        """Whether this tenant would hold more than an equal share, so that the shortage is its own."""
        held = self._held[tenant]
        return held > 0 and held + amount > self.limit // (len(self._held) + 1)

    def refusal(self, tenant: str, amount: int, what: str) -> RequestError:
        """For an amount that does not fit: 429 for a tenant above its share, else 503."""
        if self.is_above_share(tenant, amount):
            return RequestError(f"your requests hold too much: {what}", status=429)
        return RequestError(f"the server is overloaded: {what}", status=503)

    def add(self, tenant: str, amount: int) -> None:
        if amount:
            self._held[tenant] += amount

    def remove(self, tenant: str, amount: int) -> None:
        self._held[tenant] -= amount
        if not self._held[tenant]:
            del self._held[tenant]


class Credits:
    """Raises RequestError: 429 for a tenant above its share, 503 where the server is full."""

    def __init__(self, max_requests: int, max_media_mib: int) -> None:
        self._requests, self._media = Shares(max_requests, has_overload=True), Shares(max_media_mib * MIB)
        self._max_media_mib = max_media_mib

    @property
    def num_requests(self) -> int:
        return self._requests.total

    @property
    def num_held_bytes(self) -> int:
        return self._media.total

    def open(self, tenant: str, was_begun: bool = False) -> None:
        """Takes a credit for one request. A resubmitted request (`was_begun`) may exceed the limits."""
        requests = self._requests
        if was_begun:
            has_room = requests.total < MAX_OVERLOAD * requests.limit
            is_let_in = has_room and requests.held(tenant) < MAX_OVERLOAD * requests.max_alone
        else:
            is_let_in = requests.fits(tenant, 1)
        if not is_let_in:
            if requests.is_above_share(tenant, 1):
                number = requests.held(tenant)
                raise RequestError(f"{number} requests of yours are open: more may not be now", status=429)
            raise RequestError(f"the server is overloaded: {requests.limit} requests may be open", status=503)
        requests.add(tenant, 1)

    def hold(self, tenant: str, num_bytes: int) -> None:
        """Counts texts and encoded media that a request keeps until it ends; also if it refuses them, since
        they are in memory."""
        refusal: RequestError | None = None
        if num_bytes and not self._media.fits(tenant, num_bytes):
            what = f"the open requests' texts and media are limited to {self._max_media_mib} MiB"
            refusal = self._media.refusal(tenant, num_bytes, what)
        self._media.add(tenant, num_bytes)
        if refusal is not None:
            raise refusal

    def close(self, tenant: str, num_held_bytes: int) -> None:
        """Returns the credit of a request, and the bytes that it held."""
        self._requests.remove(tenant, 1)
        self._media.remove(tenant, num_held_bytes)
