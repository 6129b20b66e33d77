"""What comes of a step: tokens and their log-probabilities, on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.messages import TokenLogprobs, pack_int32
from workers.llm.sampling.sampler import Sampled


class StepResult(NamedTuple):
    """What the sampled sequences of a step yielded, in the plan's order."""

    # The new tokens of each: one, or several where a step guesses ahead and is right.
    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs]]  # of each token where they are wanted, else none


class Launched:
    """A step under way. On CUDA its results are on their way to the host while the next step is prepared."""

    def __init__(self, sampled: Sampled | None, num_logprobs: Sequence[int], device: torch.device) -> None:
        self.has_run = device.type == "cpu"
        self._num_logprobs = num_logprobs
        self._parts = [_to_host(part) for part in sampled or () if part is not None]
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def result(self) -> StepResult:
        """Waits for the step: every embedding that it reads has been gathered then."""
        if self._event is not None:
            self._event.synchronize()
        if not self._parts:
            return StepResult((), ())
        token_ids, *best = (part.numpy() for part in self._parts)
        each = token_ids[:, None].tolist()
        if not best:
            return StepResult(each, ((),) * len(each))
        logprobs = [_logprobs(*row) for row in zip(*best, self._num_logprobs, strict=True)]
        return StepResult(each, logprobs)


def _logprobs(
    values: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    count: int,
) -> tuple[TokenLogprobs, ...]:
    """Of one token: its own and the `count` best; count -1: none are wanted."""
    if count < 0:
        return ()
    return (TokenLogprobs(pack_int32(ids[: count + 1]), values[: count + 1].astype("<f4").tobytes()),)


def _to_host(part: Tensor) -> Tensor:
    if part.device.type == "cpu":
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
