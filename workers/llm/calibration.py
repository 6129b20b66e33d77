"""Measures at start how long steps of different sizes take on this machine, for decode protection."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep
from workers.llm.cache.manager import CacheManager
from workers.llm.step_times import Measured, StepTimes

MAX_REPEATS = 3  # of a size that took longer than a larger one: something else had the cores
TOLERANCE = 1.05  # how much longer that may be
LARGEST_RISE = 2.5  # over the size before, which is half or more
# Times the smallest step. Prefill never stretches a step that far; longer ones are extrapolated from the last
# two measured sizes.
FAR_BEYOND = 4.0
LONGEST_HISTORY = 1024
OWNER = "calibration"


def measure_step_times(
    execute: Callable[[SequenceStart, SequenceStep], float],
    cache: CacheManager,
    max_num_batched_tokens: int,
    max_model_len: int,
    max_stretch: float,
) -> StepTimes:
    """Runs steps of 1, 2, 4, 6, 8, 12, … tokens without history and one with history. The start of a server
    waits for it, so that each runs twice, and more often only where a larger one was faster.

    `execute` starts a sequence, runs one step of it and returns the step's seconds. The cache blocks used are
    free before and after.
    """
    longest = min(max_model_len, cache.capacity)
    slot, blocks = cache.allocate(OWNER, [], longest)
    table = pack_int32(blocks)

    def seconds(num_tokens: int, num_computed: int) -> float:
        token_ids = pack_int32([0] * (num_computed + num_tokens))
        start = SequenceStart(
            slot, num_computed + num_tokens, SamplingParams(seed=0), token_ids,
            num_computed_tokens=num_computed, block_table=table,
        )  # fmt: skip
        step = SequenceStep(slot, num_tokens, is_sampled=False)
        # The first step of a size also prepares kernels.
        return min(execute(start, step), execute(start, step))

    measured: list[Measured] = []
    largest = min(max_num_batched_tokens, longest)
    for size in itertools.takewhile(lambda size: size <= largest, _sizes()):
        taken = seconds(size, 0)
        if measured and taken > LARGEST_RISE * measured[-1].seconds:
            taken = min(taken, seconds(size, 0))
        measured.append(Measured(size, taken))
        if measured[-1].seconds > FAR_BEYOND * measured[0].seconds:
            break
    for index in range(len(measured) - 2, -1, -1):
        num_tokens, least = measured[index]
        for _ in range(MAX_REPEATS):
            if least <= TOLERANCE * measured[index + 1].seconds:
                break
            least = min(least, seconds(num_tokens, 0))
        measured[index] = Measured(num_tokens, least)
    probe, history = measured[len(measured) // 2], min(LONGEST_HISTORY, longest - measured[-1].num_tokens)
    per_pair = 0.0
    if history > 0:
        longer = seconds(probe.num_tokens, history) - probe.seconds
        per_pair = max(0.0, longer) / (probe.num_tokens * history)
    cache.free(OWNER)
    return StepTimes(measured, per_pair, max_stretch)


def _sizes() -> Iterator[int]:
    """Powers of 2, and midpoints while they are small: a matmul's time may jump from 6 rows to 7, then stay
    flat up to 12."""
    yield from (1, 2, 4, 6, 8, 12, 16, 24)
    for power in itertools.count(5):
        yield 1 << power
