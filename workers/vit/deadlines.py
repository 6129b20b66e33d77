"""Deadlines of forwards in onnxruntime and TensorRT, which report no progress until they end.

Before the call the engine announces a deadline; the worker counts as hung only after it. The deadline follows
from the measured time for a floating point operation, so that it grows with the picture.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

MARGIN = 10.0  # times the measured time: other work may share the cores
UNMEASURED_FLOP_PER_S = 1e9  # before the first measurement
FORGET = 0.9  # weight of earlier forwards at each new one


class Deadlines:
    """`announce` is called with the seconds that a forward may take, and with 0 at its end."""

    def __init__(
        self,
        announce: Callable[[float], object],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announce, self._patience_s, self._clock = announce, patience_s, clock
        self._flop = self._seconds = 0.0  # of earlier forwards, weighted by `FORGET`

    @contextlib.contextmanager
    def around(self, flop: float) -> Iterator[None]:
        """Encloses a call of so many floating point operations."""
        each = self._seconds / self._flop if self._flop else 1 / UNMEASURED_FLOP_PER_S
        self._announce(MARGIN * each * flop + self._patience_s)
        start = self._clock()
        try:
            yield
        finally:
            self._flop = FORGET * self._flop + flop
            self._seconds = FORGET * self._seconds + self._clock() - start
            self._announce(0.0)
