"""The results of a step: tokens and their log-probabilities, on their way from the device to the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.packing import pack_int32
from workers.llm.sampling.base import Int64Array
from workers.llm.sampling.prompt_logprobs import PromptTensors
from workers.llm.sampling.sampler import Sampled
from workers.llm.sampling.tokens import PromptScores


class StepResult(NamedTuple):
    """The results of a step's sampled sequences, in the plan's order."""

    # The new tokens of each sequence: one, or several after successful speculation.
    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[TokenLogprobs]]  # one a token; empty where not requested
    # Of prompts, by the index of the sequence in the plan.
    prompt_scores: Mapping[int, PromptScores] = {}
    # Of the tokens behind, where the plan asks for any, by the index of the sampled sequence.
    guesses: Mapping[int, Sequence[int]] = {}


class LaunchedStep:
    """An in-flight step. On CUDA its results are copied to the host while the next step is prepared."""

    def __init__(self, device: torch.device, num_sampled: int = 0) -> None:
        """`num_sampled` sequences yield tokens, chosen all at once or in several parts."""
        self.has_run = device.type == "cpu"
        self._num_sampled, self._parts = num_sampled, list[_Part]()
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._prompts: dict[int, PromptTensors] = {}
        self._guesses = list[tuple[Sequence[int], Tensor]]()
        if not num_sampled:
            self._record(device)

    def add(self, places: Int64Array, sampled: Sampled, num_logprobs: Sequence[int]) -> None:
        """Adds a chosen token of some sampled sequences, behind those that they have; `places` are their
        indexes among these."""
        on_host = [_to_host(part) for part in sampled if part is not None]
        self._parts.append(_Part(places, on_host, num_logprobs))
        self._record(sampled.token_ids.device)

    def add_prompt(self, sequence: int, scores: PromptTensors) -> None:
        """Adds what a sequence of the plan has computed of its prompt's log-probabilities."""
        start, *tensors = scores
        self._prompts[sequence] = PromptTensors(start, *map(_to_host, tensors))
        self._record(scores.token_ids.device)

    def add_guesses(self, places: Sequence[int], token_ids: Tensor) -> None:
        """Adds a guess of the next token of some sampled sequences, behind those that they have; `places` are
        their indexes among these."""
        self._guesses.append((places, _to_host(token_ids)))
        self._record(token_ids.device)

    def result(self) -> StepResult:
        """Waits for the step. After that, every embedding that the step reads has been gathered."""
        if self._event is not None:
            self._event.synchronize()
        chosen = {place for part in self._parts for place in part.places.tolist()}
        assert len(chosen) == self._num_sampled, "not every token has been chosen"
        results = [part.result() for part in self._parts]
        prompt_scores = {sequence: tensors.to_scores() for sequence, tensors in self._prompts.items()}
        guesses: dict[int, list[int]] = {}
        for places, guessed in self._guesses:
            for place, token_id in zip(places, guessed.tolist(), strict=True):
                guesses.setdefault(place, []).append(token_id)
        if len(results) == 1:
            return results[0]._replace(prompt_scores=prompt_scores, guesses=guesses)
        token_ids: list[list[int]] = [[] for _ in range(self._num_sampled)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self._num_sampled)]
        for part, result in zip(self._parts, results, strict=True):
            for index, place in enumerate(part.places.tolist()):
                token_ids[place] += result.token_ids[index]
                logprobs[place] += result.logprobs[index]
        return StepResult(token_ids, logprobs, prompt_scores, guesses)

    def _record(self, device: torch.device) -> None:
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))


class _Part(NamedTuple):
    """Tokens that were chosen together. They are on the host once the step's event has completed."""

    places: Int64Array  # indexes among the sampled sequences
    on_host: Sequence[Tensor]  # the fields of `Sampled` that are not None
    num_logprobs: Sequence[int]

    def result(self) -> StepResult:
        token_ids, *best = (part.numpy() for part in self.on_host)
        each = token_ids[:, None].tolist()
        if not best:
            return StepResult(each, ((),) * len(each))
        logprobs = [_logprobs(*row) for row in zip(*best, self.num_logprobs, strict=True)]
        return StepResult(each, logprobs)


def _logprobs(
    values: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    count: int,
) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities of one token: its own and the `count` best; count -1: not requested."""
    if count < 0:
        return ()
    return (TokenLogprobs(pack_int32(ids[: count + 1]), values[: count + 1].astype("<f4").tobytes()),)


def _to_host(part: Tensor) -> Tensor:
    if part.device.type == "cpu":
        return part
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part, non_blocking=True)
