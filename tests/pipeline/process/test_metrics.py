from __future__ import annotations

import pytest

from pipeline.process.metrics import Histogram, Metrics
from pipeline.wire.metrics import Metric


def test_a_worker_tells_what_it_has_declared() -> None:
    metrics, counted = Metrics(), {"steps": 1, "tokens": 2}
    metrics.counters({"steps": "Steps", "tokens": "Tokens"}, lambda: counted)
    metrics.gauge("leases", "Leases", lambda: 5)
    seconds = metrics.histogram("seconds", "Seconds", (0.5, 2.0))
    for value in (0.25, 0.5, 1.0, 3.0):
        seconds.observe(value)
    metrics.labelled("ended", "Ended requests", "reason", lambda: {"stop": counted["steps"], "length": 0})
    metrics.measured("waits", "Waits", Histogram((1.0,)))
    counted["steps"] = 7
    assert metrics.values() == {"steps": 7, "tokens": 2, "leases": 5}
    assert metrics.told() == (
        Metric("steps", "counter", "Steps"),
        Metric("tokens", "counter", "Tokens"),
        Metric("leases", "gauge", "Leases"),
        Metric("seconds", "histogram", "Seconds", (0.5, 2.0), (2, 1, 1), 4.75),
        Metric("ended", "counter", "Ended requests", label="reason", values=(("stop", 7), ("length", 0))),
        Metric("waits", "histogram", "Waits", (1.0,), (0, 0)),
    )
    assert [metric.name for metric in metrics.declared] == [metric.name for metric in metrics.told()]


def test_a_name_is_declared_once() -> None:
    metrics = Metrics()
    metrics.counter("steps", "Steps", lambda: 1)
    with pytest.raises(AssertionError, match="steps"):
        metrics.gauge("steps", "Steps again", lambda: 1)
