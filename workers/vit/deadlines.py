"""How long a call may take into which nobody can look: a forward of onnxruntime or TensorRT, which gives no
sign of life.

Before the call the engine announces a deadline. Until then the worker does not count as hung, however large
the picture; after it, it does. The deadline follows what forwards have taken so far, an operation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

MARGIN = 10.0  # times what was measured: other work may share the cores
UNMEASURED_FLOP_PER_S = 1e9  # before the first measurement
FORGET = 0.9  # what earlier forwards weigh beside the newest


class Deadlines:
    """`announce` is told the seconds within which the worker moves on, and 0 when it has."""

    def __init__(
        self,
        announce: Callable[[float], object],
        patience_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._announce, self._patience_s, self._clock = announce, patience_s, clock
        self._flop = self._seconds = 0.0  # of earlier forwards, the older the less

    @contextlib.contextmanager
    def around(self, flop: float) -> Iterator[None]:
        """Around a call of so many floating point operations."""
        each = self._seconds / self._flop if self._flop else 1 / UNMEASURED_FLOP_PER_S
        self._announce(MARGIN * each * flop + self._patience_s)
        start = self._clock()
        try:
            yield
        finally:
            self._flop = FORGET * self._flop + flop
            self._seconds = FORGET * self._seconds + self._clock() - start
            self._announce(0.0)
