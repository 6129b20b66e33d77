"""The declaration of a worker's metrics, for `/metrics`."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["counter", "gauge", "histogram"]
Number = int | float


class Metric(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The value of a counter or gauge stands in `counters`, under its name. A histogram, and a metric with a
    label, have their values here."""

    name: str
    kind: Kind
    text: str  # for people: what is counted
    # Of a histogram: each bucket's largest value, except for the last bucket, which has no bound; the number
    # of values in each bucket; the sum of all values.
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    total: float = 0.0
    label: str = ""  # what tells several values of one metric apart
    values: tuple[tuple[str, Number], ...] = ()  # each with its label's value
