from __future__ import annotations

import pytest

from pipeline.wire.packing import unpack_int32
from pipeline.wire.steps import SequenceStart, SequenceStep
from workers.llm.cache.manager import CacheManager
from workers.llm.calibration import measure_step_times


def test_it_measures_what_the_machine_does_and_leaves_no_trace() -> None:
    """On a machine whose steps take 10 ms up to 16 tokens, 1 ms more for each token beyond, and 1 µs for each
    pair of tokens."""
    cache = CacheManager.of_size(200, 16, 4)
    steps: list[tuple[int, int]] = []

    def execute(start: SequenceStart, step: SequenceStep) -> float:
        num_tokens, num_computed = step.num_tokens, start.num_computed_tokens
        assert start.slot == step.slot
        assert len(unpack_int32(start.block_table)) * 16 >= num_computed + num_tokens
        assert len(unpack_int32(start.token_ids)) == num_computed + num_tokens
        steps.append((num_tokens, num_computed))
        return 0.010 + 0.001 * max(0, num_tokens - 16) + 1e-6 * num_tokens * num_computed

    times = measure_step_times(
        execute, cache, max_num_batched_tokens=2048, max_model_len=3000, max_stretch=1.25
    )
    assert [num_tokens for num_tokens, _ in steps if num_tokens <= 16][:14:2] == [1, 2, 4, 6, 8, 12, 16], (
        "each twice"
    )
    assert times.predict(4) == pytest.approx(0.010)
    assert times.predict(40) == pytest.approx(0.034)
    assert times.predict(40, num_pairs=4000) == pytest.approx(0.038)
    assert max(num_tokens for num_tokens, _ in steps) < 128, (
        "what takes many times a decode step is of no interest"
    )
    cache.check_empty()
    cache.check_integrity()


def test_a_size_that_was_disturbed_is_measured_again() -> None:
    num_left = {4: 3, 6: 2}

    def execute(start: SequenceStart, step: SequenceStep) -> float:
        num_left[step.num_tokens] = num_left.get(step.num_tokens, 0) - 1
        return 0.010 + 0.001 * step.num_tokens + (0.03 if num_left[step.num_tokens] >= 0 else 0.0)

    cache = CacheManager.of_size(200, 16, 4)
    times = measure_step_times(execute, cache, 2048, 3000, 1.25)
    for num_tokens in (1, 2, 4, 6, 8):
        assert times.predict(num_tokens) == pytest.approx(0.010 + 0.001 * num_tokens)


def test_a_tiny_cache_is_enough() -> None:
    cache = CacheManager.of_size(1, 16, 1)
    times = measure_step_times(lambda start, step: 0.01, cache, 8, 16, 1.25)
    assert times.predict(8) == pytest.approx(0.01)
    cache.check_empty()
