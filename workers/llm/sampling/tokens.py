"""What rank 0 has of a request's tokens on the host. No torch."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.wire.packing import Int32Array


class TokensSoFar(NamedTuple):
    """The tokens of a request when it takes its slot, for processors and matchers."""

    prompt: Int32Array
    output: Int32Array  # of all attempts, and from before a preemption


class PromptScores(NamedTuple):
    """Log-probabilities of prompt tokens from `start` on: of each token first, then of the likeliest ones."""

    start: int
    token_ids: npt.NDArray[np.int64]  # [n, 1 + num_best]
    logprobs: npt.NDArray[np.float32]  # [n, 1 + num_best]
    ranks: npt.NDArray[np.int64]  # [n]: of the token itself; the likeliest has rank 1
