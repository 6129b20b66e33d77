"""How much of the server each tenant may hold: open requests, and the bytes of their texts and media. Pure.

No number per tenant is set: whoever is alone may have nearly all, and who comes then finds room. A tenant may
hold at most `SHARE` times what is free, so the last part is never one tenant's, and with each further tenant
all have less. (Dynamic thresholds: A. Choudhury and E. Hahne, "Dynamic queue length thresholds for
shared-memory packet switches", 1998.)
"""

from __future__ import annotations

from collections import Counter

from pipeline.config import MIB
from pipeline.wire.errors import RequestError

SHARE = 7  # a lone tenant has 7/8; n tenants have 7 / (7 n + 1) each
MAX_OVERLOAD = 2  # times the limit: what was begun goes on though others have taken its place


class Shares:
    """A limited amount of something, and who holds how much of it."""

    def __init__(self, limit: int, has_overload: bool = False) -> None:
        """`has_overload`: what a tenant has beyond its most takes nothing from the others."""
        self.limit, self._has_overload = limit, has_overload
        # What one tenant may hold while there is no other.
        self.most_alone = max(1, limit - max(1, limit // (SHARE + 1)))
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
        return self.limit - sum(min(held, self.most_alone) for held in self._held.values())

    def fits(self, tenant: str, amount: int) -> bool:
        """A tenant that holds nothing may have whatever is left."""
        held, left = self._held[tenant], self.free - amount
        return left >= 0 and (not held or held + amount <= SHARE * left)

    def is_above_share(self, tenant: str, amount: int) -> bool:
        """Whether this tenant asks for much, rather than the others have taken what there is."""
        held = self._held[tenant]
        return held > 0 and held + amount > self.limit // (len(self._held) + 1)

    def refusal(self, tenant: str, amount: int, what: str) -> RequestError:
        """Of what does not fit: 429 for a tenant that has its share, 503 where the others have taken what
        there is."""
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
    """Raises RequestError with 429 for a tenant that has its share, with 503 where the server is full."""

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
        """Takes a credit for one request. One that was begun here before goes on, be the server full."""
        requests = self._requests
        if was_begun:
            has_room = requests.total < MAX_OVERLOAD * requests.limit
            is_let_in = has_room and requests.held(tenant) < MAX_OVERLOAD * requests.most_alone
        else:
            is_let_in = requests.fits(tenant, 1)
        if not is_let_in:
            if requests.is_above_share(tenant, 1):
                number = requests.held(tenant)
                raise RequestError(f"{number} requests of yours are open: more may not be now", status=429)
            raise RequestError(f"the server is overloaded: {requests.limit} requests may be open", status=503)
        requests.add(tenant, 1)

    def hold(self, tenant: str, num_bytes: int) -> None:
        """Counts texts and encoded media that a request keeps until it ends. They count even if that is
        refused: they are there.
        """
        refusal: RequestError | None = None
        if num_bytes and not self._media.fits(tenant, num_bytes):
            what = f"the open requests' texts and media are limited to {self._max_media_mib} MiB"
            refusal = self._media.refusal(tenant, num_bytes, what)
        self._media.add(tenant, num_bytes)
        if refusal is not None:
            raise refusal

    def close(self, tenant: str, num_held_bytes: int) -> None:
        """Gives the credit of a request back, and what was held for it."""
        self._requests.remove(tenant, 1)
        self._media.remove(tenant, num_held_bytes)
