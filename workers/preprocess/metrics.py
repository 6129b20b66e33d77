"""What `/metrics` shows of preprocess."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.process.metrics import (
    POOL_BYTES,
    POOL_USED_BYTES,
    REFUSED_MESSAGES,
    TRANSPORT_BYTES,
    Metrics,
)
from pipeline.transport.slots import SlotAllocator
from workers.preprocess.preprocessor import Preprocessor

COUNTED = {
    "stale_messages": "Messages of dead workers or earlier attempts, dropped",
    "refused_requests": "Requests refused before they ran",
}


def declare(
    metrics: Metrics, core: Preprocessor, pool: SlotAllocator, num_refused: Callable[[], int]
) -> None:
    """`num_refused`: messages that could not be read."""
    chunks = core.chunks
    metrics.counters(COUNTED, lambda: core.counters)
    metrics.counter("decoded_pictures", "Pictures decoded, and chunks of videos", lambda: chunks.num_decoded)
    metrics.measured(
        "stage_fetch_seconds", "To fetch a picture or video from its host or a file", core.fetcher.seconds
    )
    metrics.measured(
        "stage_media_decode_seconds", "To decode a picture, or a chunk of a video", chunks.decode_seconds
    )
    metrics.gauge(
        "held_media_bytes", "Texts and media of open requests, as they came", lambda: core.num_held_bytes
    )
    metrics.gauge("pool_bytes", POOL_BYTES, lambda: pool.nbytes)
    metrics.gauge("pool_used_bytes", POOL_USED_BYTES, lambda: pool.num_used_bytes)
    metrics.labelled("transport_bytes", TRANSPORT_BYTES, "transport", lambda: chunks.num_bytes)
    metrics.counter("refused_messages", REFUSED_MESSAGES, num_refused)
