"""What `/metrics` shows of a ViT."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.process.metrics import (
    POOL_BYTES,
    POOL_USED_BYTES,
    REFUSED_MESSAGES,
    STAGE_SECONDS,
    TRANSPORT_BYTES,
    Metrics,
)
from pipeline.transport.ends import Receiver
from pipeline.wire.encoding import EncodeMessage
from workers.vit.batcher import Batcher, Pending
from workers.vit.core import VitCore

CHUNKS = (1, 2, 4, 8, 16, 32, 64, 128)


class VitStats:
    """Declares the metrics, and measures batches."""

    def __init__(self, metrics: Metrics, core: VitCore, inbox: Receiver[EncodeMessage]) -> None:
        _declare(metrics, core)
        _declare_pool(metrics, core.batcher)
        metrics.counter("refused_messages", REFUSED_MESSAGES, lambda: inbox.num_refused)
        self._wait = metrics.histogram(
            "stage_vit_wait_seconds", "From the message with a chunk's pixels to its batch", STAGE_SECONDS
        )
        self._seconds = metrics.histogram("stage_vit_seconds", "To encode a batch of chunks", STAGE_SECONDS)
        self._chunks = metrics.histogram("vit_batch_chunks", "Chunks of a batch", CHUNKS)

    def on_begun(self, batch: Sequence[Pending], now: float) -> None:
        """`now`: of the monotonic clock, which preprocess shares."""
        for pending in batch:
            if pending.sent_at:
                self._wait.observe(max(0.0, now - pending.sent_at))
        self._chunks.observe(len(batch))

    def on_encoded(self, seconds: float) -> None:
        self._seconds.observe(seconds)


def _declare(metrics: Metrics, core: VitCore) -> None:
    batcher = core.batcher
    metrics.counter("encodes", "Chunks of pictures and videos encoded", lambda: core.num_encodes)
    metrics.counter("stale_messages", "Messages of dead workers, dropped", lambda: core.num_stale)
    metrics.gauge("pending_chunks", "Chunks that are not with all who want them", lambda: batcher.num_pending)
    metrics.counter(
        "mm_cache_queries", "Chunks that were looked up among the cached embeddings",
        lambda: batcher.num_queries,
    )  # fmt: skip
    metrics.counter("mm_cache_hits", "Chunks whose embeddings were cached", lambda: batcher.num_hits)
    metrics.labelled("transport_bytes", TRANSPORT_BYTES, "transport", lambda: core.num_bytes)


def _declare_pool(metrics: Metrics, batcher: Batcher) -> None:
    pool = batcher.allocator
    metrics.gauge("leases", "Embeddings that the LLM may read", lambda: batcher.cache.num_leases)
    metrics.gauge("cached_chunks", "Chunks with embeddings in the pool", lambda: batcher.cache.num_kept)
    metrics.gauge("pool_bytes", POOL_BYTES, lambda: pool.nbytes)
    metrics.gauge("pool_used_bytes", POOL_USED_BYTES, lambda: pool.num_used_bytes)
