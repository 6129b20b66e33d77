"""What a worker counts, declared where it is counted: `/metrics` shows it without knowing its name."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from pipeline.wire.metrics import Metric

Counts = Mapping[str, int]
DROPPED_SPANS = "Spans that OpenTelemetry's collector did not take, dropped"
REFUSED_MESSAGES = "Messages that could not be read, dropped"  # counted by each worker that others talk to


class Histogram:
    """Values by bucket. `bounds` ascend: each is the largest of its bucket; the last bucket has none."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """Of one worker. Names are those of `/metrics`, without its prefix; texts are for people."""

    def __init__(self) -> None:
        self._declared: dict[str, Metric] = {}
        self._reads: list[Callable[[], Counts]] = []
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str, text: str, read: Callable[[], int]) -> None:
        """What only grows; a worker that was replaced counts from zero again."""
        self._declare(Metric(name, "counter", text))
        self._reads.append(lambda: {name: read()})

    def counters(self, texts: Mapping[str, str], read: Callable[[], Counts]) -> None:
        """Several that are kept in one mapping, which has all these names."""
        for name, text in texts.items():
            self._declare(Metric(name, "counter", text))
        self._reads.append(read)

    def gauge(self, name: str, text: str, read: Callable[[], int]) -> None:
        """What grows and shrinks."""
        self._declare(Metric(name, "gauge", text))
        self._reads.append(lambda: {name: read()})

    def histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        self._declare(Metric(name, "histogram", text))
        histogram = self._histograms[name] = Histogram(bounds)
        return histogram

    def _declare(self, metric: Metric) -> None:
        assert metric.name not in self._declared, f"{metric.name} is counted twice"
        self._declared[metric.name] = metric

    def values(self) -> dict[str, int]:
        """Of counters and gauges."""
        return {name: value for read in self._reads for name, value in read().items()}

    def told(self) -> tuple[Metric, ...]:
        """All that is declared, histograms with their values."""
        return tuple(self._told(metric) for metric in self._declared.values())

    def _told(self, metric: Metric) -> Metric:
        if (histogram := self._histograms.get(metric.name)) is None:
            return metric
        counts = tuple(histogram.counts)
        return Metric(metric.name, metric.kind, metric.text, histogram.bounds, counts, histogram.total)
