"""What `/metrics` shows of a carrier."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.process.metrics import POOL_BYTES, POOL_USED_BYTES, REFUSED_MESSAGES, Metrics
from pipeline.transport.ends import Receiver
from workers.carrier.core import CarrierCore


def declare(metrics: Metrics, core: CarrierCore, inboxes: Iterable[Receiver[Any]]) -> None:
    reads, source, kinds = core.reads, core.source, core.transports.kinds
    metrics.labelled(
        "carrier_kind", "1 for the transport of a node's tensors, with the node's number", "source",
        lambda: {f"{node}.{kind}": 1 for node, kind in kinds.items()}, "gauge",
    )  # fmt: skip
    metrics.labelled(
        "carrier_copies", "Tensors copied from other nodes", "transport", lambda: reads.num_copies
    )
    metrics.labelled(
        "carrier_bytes", "Bytes of tensors copied from other nodes", "transport", lambda: reads.num_bytes
    )
    metrics.labelled(
        "carrier_seconds",
        "Seconds that copies of tensors of other nodes took",
        "transport",
        lambda: reads.seconds,
    )
    metrics.counters(
        {
            "carrier_lost": "Copies that were given up: the original was gone, or its node",
            "carrier_repeated": "Copies that were begun again: no byte came for seconds",
            "carrier_sent_bytes": "Bytes sent to carriers of other nodes",
            "stale_messages": "Messages of dead workers, dropped",
            "carrier_misplaced": "Messages that do not go through a carrier, dropped",
        },
        lambda: {
            "carrier_lost": reads.num_lost, "carrier_repeated": reads.num_repeated,
            "carrier_sent_bytes": source.num_bytes, "stale_messages": core.num_stale,
            "carrier_misplaced": core.num_misplaced,
        },
    )  # fmt: skip
    metrics.counter("refused_messages", REFUSED_MESSAGES, lambda: sum(inbox.num_refused for inbox in inboxes))
    _declare_pools(metrics, core)


def _declare_pools(metrics: Metrics, core: CarrierCore) -> None:
    allocators = [half.allocator for half in (core.pixels, core.embeddings) if half is not None]
    metrics.gauge("pool_bytes", POOL_BYTES, lambda: sum(one.nbytes for one in allocators))
    metrics.gauge("pool_used_bytes", POOL_USED_BYTES, lambda: sum(one.num_used_bytes for one in allocators))
    if (embeddings := core.embeddings) is not None:
        metrics.gauge("leases", "Embeddings that the LLM may read", lambda: embeddings.copies.num_leases)
