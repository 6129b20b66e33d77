"""What rank 0 counts and measures of its steps."""

from __future__ import annotations

from pipeline.process.metrics import STAGE_SECONDS, Metrics

COUNTED = {
    "steps": "Steps computed",
    "generation_tokens": "Tokens yielded",
}
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's bounds


class StepStats:
    def __init__(self, metrics: Metrics) -> None:
        self.counters = dict.fromkeys(COUNTED, 0)
        metrics.counters(COUNTED, lambda: self.counters)
        self._tokens = metrics.histogram("iteration_tokens_total", "Tokens that a step computes", STEP_TOKENS)
        self._seconds = metrics.histogram(
            "step_seconds", "From a step's start, or the end of the step before it, to its end", STAGE_SECONDS
        )

    def on_step(self, num_tokens: int, seconds: float) -> None:
        """`num_tokens`: of prompts and decodes, guesses included."""
        self._tokens.observe(num_tokens)
        self._seconds.observe(seconds)
