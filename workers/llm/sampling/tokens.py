"""What rules about the next token are told when a request starts. No torch: matchers live on the host."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.wire.messages import Int32Array


class Tokens(NamedTuple):
    """What a request has when it takes its slot."""

    prompt: Int32Array
    output: Int32Array  # of all attempts, and of before a preemption
