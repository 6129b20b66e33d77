from __future__ import annotations

import numpy as np
import torch

from pipeline.wire.sampling import SamplingParams
from tests.workers.llm.sampling.rig import make_sampler, make_setup, start
from workers.llm.sampling.base import LogitRows, TokensSoFar
from workers.llm.sampling.penalties import Penalties

ALL = SamplingParams(
    temperature=0, seed=1, presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=2.0
)
LOGITS = [4.0, -1.0, 0.5, 6.0, 0.0]


def tokens(prompt: list[int], output: list[int]) -> TokensSoFar:
    return TokensSoFar(np.array(prompt, dtype=np.int32), np.array(output, dtype=np.int32))


def test_penalties_count_the_output_and_repetition_the_prompt_too() -> None:
    penalties = Penalties(make_setup(2, 5))
    assert penalties.start(1, ALL, tokens([0, 1], [3, 3]))
    logits = torch.tensor([LOGITS] * 3)
    rows = LogitRows(np.array([2]), np.array([1]), np.array([2]))
    penalties.apply(logits, rows)
    assert logits[2].tolist() == [2.0, -2.0, 0.5, 6.0 / 2 - 1.0 - 2 * 0.5, 0.0]
    assert logits[:2].tolist() == [LOGITS] * 2, "rows that are not named stay as they are"
    penalties.accept(np.array([1]), torch.tensor([0]))
    logits = torch.tensor([LOGITS] * 3)
    penalties.apply(logits, rows)
    assert logits[2, 0].item() == 2.0 - 1.0 - 0.5, "what was chosen since counts"


def test_a_request_without_penalties_takes_no_memory_and_reads_no_history() -> None:
    penalties = Penalties(make_setup(2, 5))
    plain = SamplingParams(seed=1)
    assert not penalties.start(0, plain, tokens([], []))
    assert penalties._counts is None
    for name, value in (("presence_penalty", -1.0), ("frequency_penalty", 0.1), ("repetition_penalty", 1.1)):
        assert penalties.start(0, SamplingParams(seed=1, **{name: value}), tokens([], []))  # type: ignore[arg-type]


def test_what_was_chosen_and_what_an_earlier_attempt_chose_count_alike() -> None:
    """Greedy over two almost equal tokens: each token that is taken makes way for the other."""
    logits, params = (
        torch.tensor([[1.0, 1.1, 0.0]]),
        SamplingParams(temperature=0, seed=1, frequency_penalty=0.5),
    )

    def run(output: list[int], count: int) -> list[int]:
        sampler, made = make_sampler(1, 3), list(output)
        start(sampler, 0, params, prompt=[2], output=output)
        for _ in range(count):
            sampled = sampler.sample(logits.clone(), np.array([0]), np.array([1 + len(made)]))
            made += sampled.token_ids.tolist()
        return made

    whole = run([], 6)
    assert whole == [1, 0, 1, 0, 1, 0]
    assert run(whole[:3], 3) == whole
