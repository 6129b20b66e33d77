"""How long steps take, and so how many prompt tokens ride along with running streams almost for free. Pure:
no clock, no torch.

A decode step is bound by reading the weights, so some more tokens cost little: up to where the arithmetic
takes over. Where that is depends on the machine, the model and the load: measured at start, corrected by
every step.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

SMOOTHING = 0.1  # weight of the newest step in the corrections
LARGEST_SMOOTHING = 0.5  # weight of one that speaks for many, because none of its kind came for long
# one step says no more than that the machine is so many times slower: it may just have been interrupted
LARGEST_JUMP = 2.0
FIXED_COST_SLACK = 1.1  # what costs hardly more than a single token rides along
MOST_TO_WAIT = 31
MIXED_STEPS_IN_A_ROW = 24  # then one without prefill, to see how long the streams' own steps take by now


class Measured(NamedTuple):
    """One step of `num_tokens` tokens without history took `seconds`."""

    num_tokens: int
    seconds: float


class StepTimes:
    """`per_pair` is the cost in seconds of one new token attending to one earlier token.

    `max_stretch` bounds a step with prefill to so many times the step with the decodes alone.
    """

    def __init__(self, measured: Sequence[Measured], per_pair: float, max_stretch: float) -> None:
        """Raises ValueError without a measured step."""
        if not measured:
            raise ValueError("there is no measured step")
        self._sizes = [point.num_tokens for point in measured]
        self._seconds: list[float] = []
        for point in measured:  # noise must not make a larger step look shorter
            self._seconds.append(max(point.seconds, *self._seconds[-1:], 1e-9))
        self._per_pair, self._max_stretch = per_pair, max_stretch
        self._alone, self._mixed = 1.0, 1.0  # measured over predicted, of steps without and with prefill
        self._num_mixed_in_a_row = 0
        self._num_to_wait = 0  # steps of the streams alone before the next mixed one

    def predict(self, num_tokens: int, num_pairs: int = 0) -> float:
        """Seconds of a step, before correction: linear between measured sizes, and on from the last two."""
        sizes, seconds = self._sizes, self._seconds
        if len(sizes) == 1:
            return seconds[0] * max(1.0, num_tokens / sizes[0]) + num_pairs * self._per_pair
        right = min(max(bisect_left(sizes, num_tokens), 1), len(sizes) - 1)
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        inside = max(num_tokens, sizes[0]) - sizes[right - 1]
        return seconds[right - 1] + slope * inside + num_pairs * self._per_pair

    def num_free_tokens(self, num_decodes: int, prefills: Sequence[tuple[int, int]]) -> int:
        """Most prompt tokens in a step with `num_decodes` streams.

        `prefills`: in turn, how many tokens each has to offer, and behind how many others. At least one
        token, for prompts must get on; but none for some steps after one that took too long, and now and
        then, or a machine that has become slower as a whole would look as if only the mixed steps had.
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

        alone = self._alone * self.predict(num_decodes)
        allowed, cheapest = self._max_stretch * alone, cost(1)
        if cheapest > allowed:
            # No mixed step is to be had for that, as on a GPU, where decodes alone are one graph. So one is
            # made to pay, and the streams get so many steps of their own for it that on average they are
            # stretched no more than they may be.
            allowed = FIXED_COST_SLACK * cheapest
            self._num_to_wait = min(
                math.ceil((cheapest / alone - 1) / (self._max_stretch - 1)) - 1, MOST_TO_WAIT
            )
        low, high = 1, 1 + max(1, sum(num_offered for num_offered, _ in prefills))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(middle) <= allowed else (low, middle)
        return low

    def observe(self, num_decodes: int, num_prefill: int, num_pairs: int, seconds: float) -> None:
        """Corrects by a step that has run.

        Steps without a stream say nothing: they have nobody to protect.
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
