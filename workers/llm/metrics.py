"""What `/metrics` shows of rank 0, beside the requests' times (`request_stats.py`) and the steps'."""

from __future__ import annotations

from pipeline.process.metrics import REFUSED_MESSAGES, Metrics
from pipeline.transport.ends import Receiver
from pipeline.wire.generation import LlmMessage
from workers.llm.cache.manager import CacheManager
from workers.llm.engine import Engine
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import COUNTED as GUESSES
from workers.llm.speculation.drafter import Drafter

STALE_MESSAGES = "Messages of dead workers or earlier attempts, dropped"


def declare(metrics: Metrics, engine: Engine, inbox: Receiver[LlmMessage]) -> None:
    scheduler = engine.scheduler
    _declare_queues(metrics, scheduler)
    _declare_cache(metrics, scheduler.cache)
    if scheduler.drafter is not None:
        declare_guesses(metrics, scheduler.drafter)
    metrics.counter("stale_messages", STALE_MESSAGES, lambda: engine.intake.counters["stale_messages"])
    metrics.counter(
        "clients_cut_off", "Clients that lagged too far behind", lambda: engine.num_clients_cut_off
    )
    metrics.counter("refused_messages", REFUSED_MESSAGES, lambda: inbox.num_refused)


def _declare_queues(metrics: Metrics, scheduler: Scheduler) -> None:
    metrics.gauge("num_requests_running", "Requests in the steps", lambda: len(scheduler.running))
    metrics.gauge("num_requests_waiting", "Requests that wait for a slot", lambda: len(scheduler.waiting))
    metrics.counter(
        "num_preemptions", "Requests preempted for their blocks", lambda: scheduler.num_preemptions
    )


def _declare_cache(metrics: Metrics, cache: CacheManager) -> None:
    blocks, slots, snapshots = cache.blocks, cache.slots, cache.snapshots
    metrics.gauge("kv_blocks", "Blocks of the KV cache", lambda: blocks.num_blocks)
    metrics.gauge("block_size", "Tokens of a block", lambda: blocks.block_size)
    metrics.gauge(
        "free_blocks", "Blocks of the KV cache that are free or may be evicted", lambda: blocks.num_free
    )
    metrics.gauge("cached_blocks", "Blocks of the KV cache that hold a prefix", lambda: blocks.num_cached)
    metrics.gauge(
        "kv_cache_usage_perc", "Share of the KV cache's blocks that requests hold, from 0 to 1",
        lambda: 1 - blocks.num_free / blocks.num_blocks,
    )  # fmt: skip
    metrics.gauge("slots", "Sequences that may run at once", lambda: slots.num_slots)
    metrics.gauge("free_slots", "Sequences that may still start", lambda: slots.num_free)
    if snapshots is not None:
        metrics.gauge("snapshots", "Places for layers' states behind prefixes", lambda: snapshots.num_places)
        metrics.gauge(
            "free_snapshots", "Places for layers' states that are free or may be evicted",
            lambda: snapshots.num_free,
        )  # fmt: skip
        metrics.gauge(
            "cached_snapshots", "Places that hold the layers' states behind a prefix", lambda: len(snapshots)
        )


def declare_guesses(metrics: Metrics, drafter: Drafter) -> None:
    metrics.counters(GUESSES, lambda: drafter.counters)
    metrics.labelled(
        "spec_decode_num_accepted_tokens_per_pos", "Guessed tokens that were right, by their place",
        "position", lambda: {str(place): count for place, count in enumerate(drafter.accepted_by_place)},
    )  # fmt: skip
