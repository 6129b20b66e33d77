"""What a worker counts, declared where it is counted: `/metrics` shows it without knowing its name."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from pipeline.wire.metrics import Kind, Metric, Number

Counts = Mapping[str, Number]
# Seconds that a stage of a request takes, from a picture in memory to a video from a slow host.
STAGE_SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0,
)  # fmt: skip
DROPPED_SPANS = "Spans that OpenTelemetry's collector did not take, dropped"
TRANSPORT_BYTES = "Bytes handed to another process: pixels, embeddings; by tcp media and outputs"
POOL_BYTES = "Size of the pool, for pixels in preprocess and for embeddings in a ViT"
POOL_USED_BYTES = "Bytes of the pool that are in use or cached"
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
        self._labelled: dict[str, Callable[[], Counts]] = {}
        self._histograms: dict[str, Histogram] = {}

    def counter(self, name: str, text: str, read: Callable[[], Number]) -> None:
        """What only grows; a worker that was replaced counts from zero again."""
        self._declare(Metric(name, "counter", text))
        self._reads.append(lambda: {name: read()})

    def counters(self, texts: Mapping[str, str], read: Callable[[], Counts]) -> None:
        """Several that are kept in one mapping, which has all these names."""
        for name, text in texts.items():
            self._declare(Metric(name, "counter", text))
        self._reads.append(read)

    def labelled(
        self, name: str, text: str, label: str, read: Callable[[], Counts], kind: Kind = "counter"
    ) -> None:
        """Several values under one name, told apart by a label. Of its values there must be few."""
        self._declare(Metric(name, kind, text, label=label))
        self._labelled[name] = read

    def gauge(self, name: str, text: str, read: Callable[[], Number]) -> None:
        """What grows and shrinks."""
        self._declare(Metric(name, "gauge", text))
        self._reads.append(lambda: {name: read()})

    def histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(bounds)
        self.measured(name, text, histogram)
        return histogram

    def measured(self, name: str, text: str, histogram: Histogram) -> None:
        """A histogram that its owner has made."""
        self._declare(Metric(name, "histogram", text))
        self._histograms[name] = histogram

    def _declare(self, metric: Metric) -> None:
        assert metric.name not in self._declared, f"{metric.name} is counted twice"
        self._declared[metric.name] = metric

    @property
    def declared(self) -> tuple[Metric, ...]:
        """All declarations, without values."""
        return tuple(self._declared.values())

    def values(self) -> dict[str, Number]:
        """Of counters and gauges without a label."""
        return {name: value for read in self._reads for name, value in read().items()}

    def told(self) -> tuple[Metric, ...]:
        """All that is declared, histograms and labelled metrics with their values."""
        return tuple(self._told(metric) for metric in self._declared.values())

    def _told(self, metric: Metric) -> Metric:
        name, kind, text = metric.name, metric.kind, metric.text
        if (histogram := self._histograms.get(name)) is not None:
            return Metric(name, kind, text, histogram.bounds, tuple(histogram.counts), histogram.total)
        if (read := self._labelled.get(name)) is not None:
            return Metric(name, kind, text, label=metric.label, values=tuple(read().items()))
        return metric
