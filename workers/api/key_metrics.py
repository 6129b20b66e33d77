"""What each API key has asked for, by the key's name. There are as many names as the keys have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from pipeline.process.metrics import Histogram, Metrics
from pipeline.wire.metrics import Metric
from workers.api.access_log import RequestRecord
from workers.api.metrics import add_histogram

PREFIX = "vlm_key_"
SECONDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
COUNTED = {
    "requests": "Requests to the model, by the name of their API key",
    "refused_requests": "Those of them that ended with an error",
    "prompt_tokens": "Tokens of their prompts",
    "generation_tokens": "Tokens of their answers",
}
TTFT, E2E = "time_to_first_token_seconds", "e2e_request_latency_seconds"
MEASURED = {
    TTFT: "From the request's head to the first token of its answer",
    E2E: "From the request's head to the end of its answer",
}


@dataclass(slots=True)
class _OfKey:
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))
    seconds: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(SECONDS) for name in MEASURED}
    )


class KeyMetrics:
    """`names` of the keys; without any, nothing is counted. Requests without a valid key count under the
    empty name."""

    def __init__(self, names: Iterable[str]) -> None:
        found = dict.fromkeys(names)
        self._by_key = {name: _OfKey() for name in (*found, "")} if found else {}

    def count(self, record: RequestRecord, now: float) -> None:
        """A request to the model that has ended."""
        if (of_key := self._by_key.get(record.key_name)) is None:
            return
        counts = of_key.counts
        counts["requests"] += 1
        counts["refused_requests"] += bool(record.failed_status)
        if record.answer is not None:
            usage = record.answer.usage
            counts["prompt_tokens"] += usage.num_prompt_tokens
            counts["generation_tokens"] += usage.num_output_tokens
        if record.first_token_at is not None:
            of_key.seconds[TTFT].observe(record.first_token_at - record.began)
            of_key.seconds[E2E].observe(now - record.began)

    def collector(self, may_see: Callable[[str], bool]) -> Collector:
        """Of the names that a reader may see."""
        return _KeyCollector({name: of_key for name, of_key in self._by_key.items() if may_see(name)})


class _KeyCollector(Collector):
    def __init__(self, by_key: Mapping[str, _OfKey]) -> None:
        self._by_key = by_key

    def collect(self) -> Iterable[CounterMetricFamily | HistogramMetricFamily]:
        if not self._by_key:
            return
        for name, text in COUNTED.items():
            counters = CounterMetricFamily(PREFIX + name, text, labels=["key"])
            for key, of_key in self._by_key.items():
                counters.add_metric([key], of_key.counts[name])
            yield counters
        for name, text in MEASURED.items():
            seconds = HistogramMetricFamily(PREFIX + name, text, labels=["key"])
            for key, of_key in self._by_key.items():
                add_histogram(seconds, [key], _told(name, text, of_key.seconds[name]))
            yield seconds


def _told(name: str, text: str, histogram: Histogram) -> Metric:
    metrics = Metrics()
    metrics.measured(name, text, histogram)
    return metrics.told()[0]
