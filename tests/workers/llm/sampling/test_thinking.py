from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import make_sampler, start

LOGITS = torch.tensor([[0.0, 3.0, 9.0, 8.0, 7.0, 1.0]])
GREEDY = SamplingParams(temperature=0, seed=1)


def run(params: SamplingParams, output: list[int], count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    """So many tokens behind an output, of a sampler that starts there."""
    sampler, made = make_sampler(1, logits.shape[-1]), list(output)
    start(sampler, 0, params, prompt=[1], output=output)
    while len(made) < len(output) + count:
        drawn = sampler.sample(logits.clone(), np.array([0]), np.array([1 + len(made)]))
        made.append(int(drawn.token_ids[0]))
    return made


def budget(number: int, *end: int, **options: float) -> SamplingParams:
    return SamplingParams(seed=1, thinking_budget=number, thinking_end=end, **{"temperature": 0, **options})


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_thought_that_goes_on_is_ended(number: int) -> None:
    assert run(budget(number, 5), [], 6) == [*[2] * number, 5, *[2] * (5 - number)]


def test_an_end_of_several_tokens() -> None:
    assert run(budget(2, 5, 4, 0), [], 7) == [2, 2, 5, 4, 0, 2, 2]


def test_a_thought_that_has_ended_stays_so() -> None:
    """Whether it ended in this attempt or before."""
    assert run(budget(2, 2), [], 4) == [2, 2, 2, 2]
    assert run(budget(3, 5), [1, 5], 4) == [1, 5, 2, 2, 2, 2]
    assert run(budget(4, 5, 4), [5, 5, 4], 4) == [5, 5, 4, 2, 2, 2, 2]


@pytest.mark.parametrize("stop", range(7))
def test_another_attempt_goes_on_where_the_one_before_was(stop: int) -> None:
    whole = run(budget(3, 5, 4), [], 7)
    assert run(budget(3, 5, 4), whole[:stop], 7 - stop) == whole


def test_a_sampled_thought_is_ended_too_and_others_are_left_alone() -> None:
    made = run(budget(3, 0, temperature=1.0, top_p=0.5), [], 5)
    assert made[3] == 0
    sampler = make_sampler(3, 6)
    for slot, params in enumerate((budget(1, 5), GREEDY, budget(9, 5))):
        start(sampler, slot, params, prompt=[1])
    drawn = [
        sampler.sample(LOGITS.expand(3, -1).clone(), np.arange(3), np.full(3, 1 + number)).token_ids.tolist()
        for number in range(3)
    ]
    assert drawn == [[2, 2, 2], [5, 2, 2], [2, 2, 2]]


def test_without_its_tokens_there_is_no_budget() -> None:
    assert run(budget(1), [], 3) == [2, 2, 2]


@pytest.mark.parametrize(
    "fields", [{"thinking_budget": -1}, {"thinking_end": (-1,)}, {"thinking_end": (1,) * 17}]
)
def test_values_out_of_range_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**fields)  # type: ignore[arg-type]
    assert caught.value.info.field == next(iter(fields))
