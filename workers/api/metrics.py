"""What the workers count, in Prometheus' text format.

No name of a metric stands here but those of what every worker has: the workers say themselves what they
count, and of which kind it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from pipeline.wire.control import WorkerState
from pipeline.wire.metrics import Metric

PREFIX = "vlm_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OF_ALL = (
    Metric("worker_ready", "gauge", "1 while the worker serves, else 0"),
    Metric("worker_restarts", "counter", "How often the worker was replaced"),
    Metric("open_requests", "gauge", "Requests that the worker has not finished"),
)
UNDECLARED = "Told by the worker"


@dataclass(slots=True)
class _Family:
    """A metric of all workers that have it."""

    metric: Metric
    samples: list[str] = field(default_factory=list)

    def text(self) -> str:
        name, kind = PREFIX + self.metric.name, self.metric.kind
        words = self.metric.text.replace("\\", "\\\\").replace("\n", "\\n")
        return "\n".join((f"# HELP {name} {words}", f"# TYPE {name} {kind}", *self.samples, ""))


def exposition(workers: Iterable[WorkerState]) -> bytes:
    """One family a metric. A worker that was replaced counts from zero again."""
    families: dict[str, _Family] = {}
    for state in workers:
        of_all = (int(state.is_ready), state.epoch - 1, state.num_open_requests)
        values = {
            **state.counters,
            **{metric.name: value for metric, value in zip(OF_ALL, of_all, strict=True)},
        }
        declared = {metric.name: metric for metric in (*OF_ALL, *state.metrics)}
        for name in {**declared, **values}:
            metric = declared.get(name) or Metric(name, "gauge", UNDECLARED)
            family = families.setdefault(name, _Family(metric))
            if metric.kind == "histogram":
                family.samples += _buckets(metric, str(state.worker))
            elif name in values:
                family.samples.append(f'{PREFIX}{name}{{worker="{state.worker}"}} {values[name]}')
    return "".join(family.text() for family in families.values()).encode()


def _buckets(histogram: Metric, worker: str) -> Iterator[str]:
    """Prometheus' buckets hold all values up to their bound."""
    name, label = PREFIX + histogram.name, f'worker="{worker}"'
    bounds = (*(f"{bound:g}" for bound in histogram.bounds), "+Inf")
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield f'{name}_bucket{{{label},le="{bound}"}} {count}'
    yield f"{name}_sum{{{label}}} {histogram.total}"
    yield f"{name}_count{{{label}}} {sum(histogram.counts)}"
