"""Measures at start how long steps of different sizes take on this machine, for decode protection."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pipeline.messages import SequencePlan, pack_int32
from workers.llm.cache.blocks import BlockManager
from workers.llm.step_times import Measured, StepTimes

NUM_REPEATS = 3
SHORT_S = 0.05  # a longer step is measured once: noise is small beside it
FAR_BEYOND = 4.0  # times the smallest step: no prompt share makes a step so long, and the line goes on from the last two
LONGEST_HISTORY = 1024
OWNER = "calibration"


def measure_step_times(
    execute: Callable[[Sequence[SequencePlan]], float], blocks: BlockManager, max_num_batched_tokens: int, max_model_len: int, max_stretch: float
) -> StepTimes:
    """Runs steps of 1, 2, 4, 6, 8, 12, … tokens without history and one with. `execute` runs a step and returns its seconds.

    Uses blocks of the cache that nobody has yet, and gives them back.
    """
    longest = min(max_model_len, blocks.num_blocks * blocks.block_size)
    table = pack_int32(blocks.allocate(OWNER, [], longest))

    def seconds(num_tokens: int, num_computed: int) -> float:
        positions = np.broadcast_to(np.arange(num_computed, num_computed + num_tokens, dtype=np.int32), (3, num_tokens))
        plan = SequencePlan(0, pack_int32([0] * num_tokens), positions.tobytes(), num_computed, table, (), is_sampled=False)
        execute([plan])  # the first one of a size also prepares kernels
        first = execute([plan])
        return first if first > SHORT_S else statistics.median([first, *(execute([plan]) for _ in range(NUM_REPEATS - 1))])

    measured: list[Measured] = []
    for size in itertools.takewhile(lambda size: size <= min(max_num_batched_tokens, longest), _sizes()):
        measured.append(Measured(size, seconds(size, 0)))
        if measured[-1].seconds > FAR_BEYOND * measured[0].seconds:
            break
    probe, history = measured[len(measured) // 2], min(LONGEST_HISTORY, longest - measured[-1].num_tokens)
    per_pair = max(0.0, seconds(probe.num_tokens, history) - probe.seconds) / (probe.num_tokens * history) if history > 0 else 0.0
    blocks.free(OWNER)
    return StepTimes(measured, per_pair, max_stretch)


def _sizes() -> Iterator[int]:
    """Powers of 2, and what lies midway: a product's time may leap from 6 rows to 7 and then stay up to 12."""
    yield from (1, 2)
    for power in itertools.count(2):
        yield from (1 << power, 3 << power - 1)
