"""The workers' metrics in the format of Prometheus.

Only the metrics common to all workers are named here. The workers declare all others, with their kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from pipeline.wire.control import WorkerState
from pipeline.wire.metrics import Kind, Metric

PREFIX = "vlm_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OF_ALL = (
    Metric("worker_ready", "gauge", "1 while the worker serves, else 0"),
    Metric("worker_restarts", "counter", "How often the worker was replaced"),
    Metric("open_requests", "gauge", "Requests that the worker has not finished"),
)
UNDECLARED = "Told by the worker"
# The library appends `_total` to a counter's name. These counters keep their names, so they are untyped.
TYPES: Mapping[Kind, str] = {"counter": "unknown", "gauge": "gauge"}


class WorkerCollector(Collector):
    """One family a metric, with a sample of each worker. A replaced worker counts from zero."""

    def __init__(self, workers: Callable[[], Iterable[WorkerState]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Family]:
        families: dict[str, Family] = {}
        for state in self._workers():
            of_all = (int(state.is_ready), state.epoch - 1, state.num_open_requests)
            values = {
                **state.counters,
                **{metric.name: value for metric, value in zip(OF_ALL, of_all, strict=True)},
            }
            declared = {metric.name: metric for metric in (*OF_ALL, *state.metrics)}
            for name in {**declared, **values}:
                metric = declared.get(name) or Metric(name, "gauge", UNDECLARED)
                if (family := families.get(name)) is None:
                    family = families[name] = _family(metric)
                if isinstance(family, HistogramMetricFamily):
                    family.add_metric([str(state.worker)], _buckets(metric), metric.total)
                elif name in values:
                    family.add_sample(PREFIX + name, {"worker": str(state.worker)}, values[name])
        return families.values()


def _family(metric: Metric) -> Family:
    if metric.kind == "histogram":
        return HistogramMetricFamily(PREFIX + metric.name, metric.text, labels=["worker"])
    return Family(PREFIX + metric.name, metric.text, TYPES[metric.kind])


def _buckets(histogram: Metric) -> list[tuple[str, float]]:
    """Prometheus' buckets, which are cumulative: each counts all values up to its bound."""
    bounds = (*(f"{bound:g}" for bound in histogram.bounds), "+Inf")
    return list(zip(bounds, accumulate(histogram.counts), strict=True))


def exposition(collector: Collector) -> bytes:
    return generate_latest(collector)
