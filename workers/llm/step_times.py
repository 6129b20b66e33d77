"""Predicts how long steps take, and so how many prompt tokens a decode step can add almost for free. Pure: no
clock, no torch.

A decode step is bound by reading the weights, so further tokens cost little until arithmetic becomes the
bound. That point depends on the machine, the model and the load: it is measured at start and corrected by
every step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

SMOOTHING = 0.1  # weight of the newest step in the corrections
LARGEST_SMOOTHING = 0.5  # weight of a decode step after many mixed ones
# A single step may have been interrupted: it counts as at most so many times slower than expected.
LARGEST_JUMP = 2.0
FIXED_COST_SLACK = 1.1  # prompt tokens that raise the cost of a mixed step no further are included
MAX_STEPS_TO_WAIT = 31  # decode steps between two mixed steps
MIXED_STEPS_IN_A_ROW = 24  # then a step without prefill, to measure decodes alone again


class Measured(NamedTuple):
    """One step of `num_tokens` tokens without history took `seconds`."""

    num_tokens: int
    seconds: float


class StepSeconds(NamedTuple):
    """A step that has run."""

    num_streams: int  # that decode
    num_decodes: int  # tokens, drafts among them
    seconds: float


class StepTimes:
    """`per_pair` is the cost in seconds of one new token attending to one earlier token.

    `max_stretch` bounds the time of a step with prefill, in multiples of the same step's decodes alone.
    """

    def __init__(self, measured: Sequence[Measured], per_pair: float, max_stretch: float) -> None:
        """Raises ValueError without a measured step."""
        if not measured:
            raise ValueError("there is no measured step")
        self._sizes = [point.num_tokens for point in measured]
        self._seconds: list[float] = []
        for point in measured:  # noise must not make a larger step look shorter
            self._seconds.append(max(point.seconds, *self._seconds[-1:], 1e-9))
        self._per_pair, self.max_stretch = per_pair, max_stretch
        self._alone, self._mixed = 1.0, 1.0  # measured over predicted, of steps without and with prefill
        self._num_mixed_in_a_row = 0
        self._num_to_wait = 0  # decode steps before the next mixed step

    def predict(self, num_tokens: int, num_pairs: int = 0) -> float:
        """Seconds of a step, before correction: linear between measured sizes, then from the last two."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0] * max(1.0, num_tokens / sizes[0]) + num_pairs * self._per_pair
        right = min(max(bisect_left(sizes, num_tokens), 1), len(sizes) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        inside = max(num_tokens, sizes[0]) - sizes[right - 1]
        return seconds[right - 1] + slope * inside + num_pairs * self._per_pair

    def num_free_tokens(
        self, num_decodes: int, prefills: Sequence[tuple[int, int]], stretch: float | None = None
    ) -> int:
        """The largest number of prompt tokens in a step with `num_decodes` decodes, which they make at most
        `stretch` times longer, by default `max_stretch`.

        `prefills`: for each, in turn, its offered tokens and its computed tokens. The result is at least 1,
        so that prompts progress. It is 0 for some steps after an overlong mixed step, and after
        `MIXED_STEPS_IN_A_ROW`: else a slowdown of the whole machine would be ascribed to mixed steps alone.
        """
        if self._num_mixed_in_a_row >= MIXED_STEPS_IN_A_ROW:
            return 0
        if self._num_to_wait > 0:
            return 0

        def cost(num_tokens: int) -> float:
            num_pairs, left = 0, num_tokens
            for num_offered, num_computed in prefills:
                taken = min(left, num_offered)
                num_pairs, left = num_pairs + taken * (num_computed + taken // 2), left - taken
            return self._mixed * self.predict(num_decodes + num_tokens, num_pairs)

        alone, stretch = self._alone * self.predict(num_decodes), stretch or self.max_stretch
        allowed, cheapest = stretch * alone, cost(1)
        if cheapest > allowed:
            # Every mixed step costs more than allowed, as on a GPU, where decodes alone are one graph. So a
            # mixed step may exceed the bound, and is followed by so many decode steps that the average
            # stretch stays within it.
            allowed = FIXED_COST_SLACK * cheapest
            self._num_to_wait = min(math.ceil((cheapest / alone - 1) / (stretch - 1)) - 1, MAX_STEPS_TO_WAIT)
        low, high = 1, 1 + max(1, sum(num_offered for num_offered, _ in prefills))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= allowed else (low, middle)
        return low

    def spare_s(self, num_decodes: int, stretch: float | None = None) -> float:
        """Seconds that a stretch, by default `max_stretch`, allows beside a step of so many decodes alone."""
        return ((stretch or self.max_stretch) - 1) * self._alone * self.predict(num_decodes)

    def observe(self, num_decodes: int, num_prefill: int, num_pairs: int, seconds: float) -> None:
        """Corrects the predictions by a step that has run.

        Steps without decodes are ignored: they delay no stream.
        """
        if not num_decodes:
            return
        ratio = seconds / self.predict(num_decodes + num_prefill, num_pairs)
        if num_prefill:
            self._mixed += SMOOTHING * (min(ratio, LARGEST_JUMP * self._mixed) - self._mixed)
            self._num_mixed_in_a_row += 1
        else:
            weight = min(SMOOTHING * (1 + self._num_mixed_in_a_row), LARGEST_SMOOTHING)
            self._alone += weight * (min(ratio, LARGEST_JUMP * self._alone) - self._alone)
            self._num_mixed_in_a_row = 0
            self._num_to_wait = max(0, self._num_to_wait - 1)
