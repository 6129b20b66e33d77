"""The tokens of a request at its start, for processors and matchers. No torch: matchers run on the host."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.wire.packing import Int32Array


class TokensSoFar(NamedTuple):
    """The tokens of a request when it takes its slot."""

    prompt: Int32Array
    output: Int32Array  # of all attempts, and from before a preemption
