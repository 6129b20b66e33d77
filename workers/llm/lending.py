"""How long the ViTs have all cores before the next step, where the two roles take turns. Pure: no clock.

A gap of a stream is the time that was lent and the step behind it. So either the ViTs have what the stretch
of the streams leaves, or the prompts in the step have it: one after the other, while both have work.
"""

from __future__ import annotations

from typing import NamedTuple

from workers.llm.step_times import StepSeconds, StepTimes

LONGEST_S = 0.2  # a request that arrives meanwhile waits for the end
# Of the streams' gaps in a crowd: more requests with pictures wait for their first token than streams run.
# The sooner they decode together, the fewer steps there are. A crowd is over when none waits: those of it
# that stream already must not hold up the others.
CROWDED_STRETCH = 4.0


class Loan(NamedTuple):
    seconds: float
    defers_prefill: bool = False  # the next step is for decodes alone
    stretch: float | None = None  # of the next step by its prompts, beyond what they may otherwise


class Lending:
    """Remembers whose turn it is beside the streams."""

    def __init__(self) -> None:
        self._has_lent = self._is_crowd = False

    def observe(self, step: StepSeconds, num_waiting: int) -> None:
        """After each step. `num_waiting`: requests with pictures wait for their first token."""
        self._is_crowd = num_waiting > (0 if self._is_crowd else step.num_streams)

    def behind(
        self, step: StepSeconds, step_times: StepTimes | None, has_prefill: bool, is_awaited: bool
    ) -> Loan:
        """After `step`. `has_prefill`: prompts could be computed; `is_awaited`: a ViT has work.

        Half of the time is lent while no stream runs.
        """
        if step_times is None or not step.num_streams:
            self._has_lent = False
            return Loan(min(step.seconds, LONGEST_S) if is_awaited else 0.0)
        stretch = max(CROWDED_STRETCH, step_times.max_stretch) if self._is_crowd else None
        if not is_awaited or (has_prefill and self._has_lent):
            self._has_lent = False
            return Loan(0.0, stretch=stretch)
        self._has_lent = True
        return Loan(min(step_times.spare_s(step.num_decodes, stretch), LONGEST_S), defers_prefill=True)
