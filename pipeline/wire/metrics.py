"""How `/metrics` shows what a worker counts."""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["counter", "gauge", "histogram"]


class Metric(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The value of a counter or gauge stands in `counters`, under its name. A histogram has its own here."""

    name: str
    kind: Kind
    text: str  # for people: what is counted
    # Of a histogram: the largest value of each bucket but the last, which has the rest; how many values each
    # bucket has; the sum of all.
    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    total: float = 0.0
