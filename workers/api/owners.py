"""Which tenant has asked for a request: its work is shown under its id to this tenant only. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

KEPT_S = 10.0  # after a request's end: workers tell of their work a little later
MAX_ENDED = 8192  # requests that are kept behind their end


class Owners:
    """Bounded by the open requests, and `MAX_ENDED` more. Times are of a steady clock."""

    def __init__(self) -> None:
        self._tenants: dict[str, str] = {}
        self._ended: deque[tuple[float, str]] = deque()

    def __len__(self) -> int:
        return len(self._tenants)

    def begin(self, request_ids: Sequence[str], tenant: str) -> None:
        self._tenants.update(dict.fromkeys(request_ids, tenant))

    def end(self, request_ids: Sequence[str], now: float) -> None:
        self._ended.extend((now, request_id) for request_id in request_ids)
        while self._ended and (now - self._ended[0][0] > KEPT_S or len(self._ended) > MAX_ENDED):
            self._tenants.pop(self._ended.popleft()[1], None)

    def tenant_of(self, request_id: str) -> str | None:
        """None for a request that did not come over this endpoint, or is long over."""
        return self._tenants.get(request_id)
