"""How long the ViTs have all cores after a step, where the two roles take turns. Pure."""

from __future__ import annotations

from workers.llm.step_times import StepSeconds, StepTimes

LONGEST_S = 0.2  # a request that arrives meanwhile waits for the end


def lending_s(step: StepSeconds, step_times: StepTimes | None) -> float:
    """Seconds. Beside running streams, what their stretch leaves behind the step; else half of the time."""
    if step.num_decodes and step_times is not None:
        return min(step_times.spare_s(step), LONGEST_S)
    return min(step.seconds, LONGEST_S)
