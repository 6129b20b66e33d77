"""What the workers count, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.wire.messages import WorkerState

PREFIX = "vlm_"
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
DESCRIPTIONS = {
    "worker_ready": "1 while the worker serves, else 0",
    "worker_restarts": "How often the worker was replaced",
    "open_requests": "Requests that the worker has not finished",
}
COUNTED = "Counted by the worker since its start"


class WorkerCollector(Collector):
    """One family a count, one sample a worker. A worker that was replaced counts from zero again."""

    def __init__(self, workers: Callable[[], Iterable[WorkerState]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[GaugeMetricFamily]:
        families: dict[str, GaugeMetricFamily] = {}
        for state in self._workers():
            values = {
                "worker_ready": int(state.is_ready),
                "worker_restarts": state.epoch - 1,
                "open_requests": state.num_open_requests,
                **state.counters,
            }
            for name, value in values.items():
                if (family := families.get(name)) is None:
                    description = DESCRIPTIONS.get(name, COUNTED)
                    family = families[name] = GaugeMetricFamily(PREFIX + name, description, labels=["worker"])
                family.add_metric([str(state.worker)], value)
        return families.values()


def exposition(collector: Collector) -> bytes:
    return generate_latest(collector)
