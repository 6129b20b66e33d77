"""What `/metrics` shows of the gateway."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.process.metrics import REFUSED_MESSAGES, TRANSPORT_BYTES, Metrics
from workers.gateway.gateway import COUNTED, Gateway

REFUSED = {
    "refused_messages": REFUSED_MESSAGES,
    "refused_connections": "Connections without a key of ours",
    "refused_subscriptions": "Subscriptions to what is not the client's",
}


def declare(metrics: Metrics, gateway: Gateway, refused: Callable[[], dict[str, int]]) -> None:
    """`refused` has the names of `REFUSED`."""
    metrics.counters(COUNTED, lambda: gateway.counters)
    metrics.gauge("clients", "Clients on other machines", lambda: gateway.num_clients)
    metrics.counters(REFUSED, refused)
    metrics.labelled("transport_bytes", TRANSPORT_BYTES, "transport", lambda: {"tcp": gateway.num_bytes})
