"""The choices of a submission."""

from __future__ import annotations

from pipeline.wire.sampling import SamplingParams
from workers.api.generation import to_choice


def test_each_choice_draws_numbers_of_its_own() -> None:
    sampling = SamplingParams(seed=5)
    assert [to_choice(sampling, index).seed for index in range(3)] == [5, 6, 7]
    assert to_choice(SamplingParams(), 1).seed is None, "the id of its request gives it one"
