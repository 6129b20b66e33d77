"""The workers' metrics in the format of Prometheus.

Only the metrics common to all workers are named here. The workers declare all others, with their kind. A
counter's name ends with `_total`. A replaced worker counts from zero, which Prometheus takes for what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from pipeline.wire.control import WorkerState
from pipeline.wire.metrics import Metric, Number
from pipeline.wire.topology import Role, WorkerId
from workers.api.vllm_metrics import VLLM_NAMES, VLLM_PREFIX

PREFIX = "vlm_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OF_ALL = (
    Metric("worker_ready", "gauge", "1 while the worker serves, else 0"),
    Metric("worker_restarts", "counter", "How often the worker was replaced"),
    Metric("open_requests", "gauge", "Requests that the worker has not finished"),
)
UNDECLARED = "Told by the worker"
Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily


class MetricSource(NamedTuple):
    """Whose a value is. `engine`: vLLM's name for the number of a group of ranks; 0 for other workers."""

    worker: str
    engine: str
    epoch: int


class Sample(NamedTuple):
    metric: Metric  # with the values, if it is a histogram
    source: MetricSource
    label: str = ""  # the value of the metric's label, if it has one
    value: Number = 0


class WorkerCollector(Collector):
    """One family a metric, with a sample of each worker. `leads`: the LLM ranks that lead a group.
    `has_vllm_names`: what vLLM measures, too, is shown once more by vLLM's name, summed over workers."""

    def __init__(
        self,
        workers: Callable[[], Iterable[WorkerState]],
        leads: Callable[[], Sequence[int]],
        model: str,
        has_vllm_names: bool = False,
    ) -> None:
        self._workers, self._leads, self._model = workers, leads, model
        self._has_vllm_names = has_vllm_names
        self._sums = _EngineSums()

    def collect(self) -> Iterable[Family]:
        leads = list(self._leads())
        samples = [sample for state in self._workers() for sample in _samples(state, leads)]
        yield from _families(PREFIX, samples, self._labels)
        if self._has_vllm_names:
            theirs = [sample for sample in samples if sample.metric.name in VLLM_NAMES]
            yield from _families(VLLM_PREFIX, self._sums.of(theirs), self._vllm_labels)

    def _labels(self, sample: Sample) -> dict[str, str]:
        more = self._vllm_labels(sample) if sample.metric.name in VLLM_NAMES else _own_label(sample)
        return {"worker": sample.source.worker, **more}

    def _vllm_labels(self, sample: Sample) -> dict[str, str]:
        return {"model_name": self._model, "engine": sample.source.engine, **_own_label(sample)}


def _own_label(sample: Sample) -> dict[str, str]:
    return {sample.metric.label: sample.label} if sample.metric.label else {}


def _samples(state: WorkerState, leads: Sequence[int]) -> Iterator[Sample]:
    source = MetricSource(str(state.worker), _engine_of(state.worker, leads), state.epoch)
    of_all = (int(state.is_ready), state.epoch - 1, state.num_open_requests)
    values = {**state.counters, **{one.name: value for one, value in zip(OF_ALL, of_all, strict=True)}}
    declared = {metric.name: metric for metric in (*OF_ALL, *state.metrics)}
    for name in {**declared, **values}:
        metric = declared.get(name) or Metric(name, "gauge", UNDECLARED)
        if metric.label:
            for label, value in metric.values:
                yield Sample(metric, source, label, value)
        elif metric.kind == "histogram":
            yield Sample(metric, source)
        elif name in values:
            yield Sample(metric, source, value=values[name])


def _engine_of(worker: WorkerId, leads: Sequence[int]) -> str:
    return str(leads.index(worker.rank)) if worker.role is Role.LLM and worker.rank in leads else "0"


class _EngineSums:
    """Sums over the workers of an engine. What a worker has counted stays in a sum when it dies: Prometheus
    would take a sum that falls for one that has begun anew, and count the other workers' share again."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str, str], Sample] = {}  # by metric, worker and label
        self._ended: dict[tuple[str, str, str], Sample] = {}  # of the worker's predecessors

    def of(self, samples: Iterable[Sample]) -> list[Sample]:
        gauges: list[Sample] = []
        for sample in samples:
            if sample.metric.kind == "gauge":
                gauges.append(sample)
                continue
            key = sample.metric.name, sample.source.worker, sample.label
            before = self._latest.get(key)
            if before is not None and before.source.epoch != sample.source.epoch:
                ended = self._ended.get(key)
                self._ended[key] = before if ended is None else _sum(before, ended)
            self._latest[key] = sample
        ended_now = (one._replace(source=self._latest[key].source) for key, one in self._ended.items())
        return _sums((*gauges, *self._latest.values(), *ended_now))


def _sums(samples: Iterable[Sample]) -> list[Sample]:
    """By metric, engine and label."""
    found: dict[tuple[str, str, str], Sample] = {}
    for sample in samples:
        key = sample.metric.name, sample.source.engine, sample.label
        before = found.get(key)
        found[key] = sample if before is None else _sum(before, sample)
    return list(found.values())


def _sum(one: Sample, other: Sample) -> Sample:
    metric = one.metric
    if metric.kind == "histogram":
        counts = tuple(map(sum, zip(metric.counts, other.metric.counts, strict=True)))
        total = metric.total + other.metric.total
        metric = Metric(metric.name, metric.kind, metric.text, metric.bounds, counts, total)
    return one._replace(metric=metric, value=one.value + other.value)


def _families(
    prefix: str, samples: Iterable[Sample], labels_of: Callable[[Sample], Mapping[str, str]]
) -> Iterable[Family]:
    families: dict[str, Family] = {}
    for sample in samples:
        metric, labels = sample.metric, labels_of(sample)
        if (family := families.get(metric.name)) is None:
            family = families[metric.name] = _family(prefix, metric, list(labels))
        if isinstance(family, HistogramMetricFamily):
            add_histogram(family, list(labels.values()), metric)
        else:
            family.add_metric(list(labels.values()), sample.value)
    return families.values()


def _family(prefix: str, metric: Metric, labels: Sequence[str]) -> Family:
    match metric.kind:
        case "counter":
            return CounterMetricFamily(prefix + metric.name, metric.text, labels=labels)
        case "gauge":
            return GaugeMetricFamily(prefix + metric.name, metric.text, labels=labels)
        case "histogram":
            return HistogramMetricFamily(prefix + metric.name, metric.text, labels=labels)


def add_histogram(family: HistogramMetricFamily, labels: Sequence[str], metric: Metric) -> None:
    """Prometheus' buckets are cumulative: each counts all values up to its bound."""
    bounds = (*(f"{float(bound)}" for bound in metric.bounds), "+Inf")
    family.add_metric(labels, list(zip(bounds, accumulate(metric.counts), strict=True)), metric.total)


def exposition(collector: Collector) -> bytes:
    return generate_latest(collector)
