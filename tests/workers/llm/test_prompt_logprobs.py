"""Log-probabilities of a prompt's tokens are those of one plain pass, through whatever cuts."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.wire.clients import (
    AbortRequest,
    Accepted,
    ChoiceProgress,
    Interrupted,
    PromptLogprobs,
    QueryRequest,
)
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CLIENT, Rig
from tests.pictures import scene
from tests.reference import Reference

NUM_BEST = 3
CHAT = [("user", [scene(1, (140, 112)), "What is that, and what else could it be?"])]
SCORED = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, seed=1, prompt_logprobs=NUM_BEST)


class Expected(NamedTuple):
    token_ids: list[int]
    logprobs: Tensor  # [n - 1, vocab]: of the tokens behind the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3_vl")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    reference = Reference(folder)
    inputs = reference.inputs(CHAT)
    with torch.inference_mode():
        logits = reference.model(**inputs).logits[0, :-1]
    return Expected(inputs["input_ids"][0].tolist(), logits.log_softmax(dim=-1))


def run(rig: Rig, sampling: SamplingParams = SCORED, name: str = "r", **options: object) -> None:
    message, ready = rig.request(CHAT, name, sampling=sampling, **options)
    rig.engine.handle(message, rig.now)
    for one in ready:
        rig.engine.handle(one, rig.now)
    rig.run()


def scores(rig: Rig) -> list[PromptLogprobs]:
    found = [output.prompt_logprobs for output in rig.outputs()]
    assert found, "an answer came"
    return [one for one in found if one is not None]


def assert_right(told: PromptLogprobs, expected: Expected) -> None:
    count = len(expected.token_ids) - 1
    ids = unpack_int32(told.token_ids).reshape(count, 1 + NUM_BEST)
    values = np.frombuffer(told.logprobs, dtype="<f4").reshape(ids.shape)
    assert ids[:, 0].tolist() == expected.token_ids[1:]
    wanted = expected.logprobs.gather(-1, torch.from_numpy(ids.astype(np.int64)))
    torch.testing.assert_close(torch.from_numpy(values.copy()), wanted, rtol=0, atol=2e-4)
    best = expected.logprobs.topk(NUM_BEST).values
    torch.testing.assert_close(torch.from_numpy(values[:, 1:].copy()), best, rtol=0, atol=2e-4)
    own = expected.logprobs.gather(-1, torch.tensor(expected.token_ids[1:])[:, None])
    ranks = 1 + (expected.logprobs > own).sum(-1)
    # Two logits nearer than rounding may swap, deep in the vocabulary.
    assert np.abs(unpack_int32(told.ranks) - ranks.numpy()).max() <= 2


def opened(folder: Path, budget: int, **options: int) -> Rig:
    rig = Rig(folder, budget, **options)
    rig.open_pool()
    return rig


@pytest.mark.parametrize("budget", [1, 7, 64, 4096])
def test_they_are_those_of_one_pass(folder: Path, expected: Expected, budget: int) -> None:
    rig = opened(folder, budget)
    run(rig)
    (accepted,) = rig.publisher.take(Accepted)
    assert unpack_int32(accepted.prompt_token_ids).tolist() == expected.token_ids
    (told,) = scores(rig)
    assert_right(told, expected)


def test_a_cached_prefix_is_computed_again(folder: Path, expected: Expected) -> None:
    rig = opened(folder, 64, block_size=4)
    run(rig, SamplingParams(temperature=0, max_tokens=4, seed=1), "first")
    rig.outputs()
    for name in ("second", "third"):
        run(rig, name=name)
        (told,) = scores(rig)
        assert_right(told, expected)


def test_several_choices_share_them(folder: Path, expected: Expected) -> None:
    rig = opened(folder, 64, block_size=4)
    run(rig, SamplingParams(max_tokens=4, ignore_eos=True, seed=1, prompt_logprobs=NUM_BEST, n=3))
    (told,) = scores(rig)
    assert_right(told, expected)


def test_another_choice_takes_them_over(folder: Path, expected: Expected) -> None:
    """The choice that computes the prompt is aborted in the middle of it."""
    rig = opened(folder, 7, block_size=4)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True, seed=1, prompt_logprobs=NUM_BEST, n=2)
    message, ready = rig.request(CHAT, "r", sampling=sampling)
    for one in (message, *ready):
        rig.engine.handle(one, rig.now)
    for _ in range(3):
        rig.engine.step(rig.now)
    abort = AbortRequest(client_id=CLIENT, request_id="r", attempt=1, index=0)
    rig.engine.handle(abort, rig.now)
    rig.run()
    (told,) = scores(rig)
    assert_right(told, expected)


def test_a_preempted_request_sends_each_once(folder: Path, expected: Expected) -> None:
    rig = opened(folder, 9, block_size=4)
    message, ready = rig.request(CHAT, "r", sampling=SCORED)
    for one in (message, *ready):
        rig.engine.handle(one, rig.now)
    for _ in range(4):
        rig.engine.step(rig.now)
    (request,) = rig.scheduler.running
    rig.scheduler._preempt(request)
    rig.engine._requests.on_preempted(request)
    for one in ready:
        rig.engine.handle(one, rig.now)
    rig.run()
    (told,) = scores(rig)
    assert_right(told, expected)


def test_with_tokens_of_an_earlier_attempt_they_are_not_sent_again(folder: Path) -> None:
    rig = opened(folder, 64)
    run(rig, choices=(ChoiceProgress(pack_int32([5])),))
    assert scores(rig) == []


def test_without_the_wish_nothing_comes(folder: Path) -> None:
    rig = opened(folder, 64)
    run(rig, SamplingParams(temperature=0, max_tokens=4, seed=1))
    assert scores(rig) == []
    (accepted,) = rig.publisher.take(Accepted)
    assert accepted.prompt_token_ids == b""


def test_whoever_missed_them_is_told_to_ask_again(folder: Path) -> None:
    """They are too large to be remembered."""
    rig = opened(folder, 64)
    run(rig)
    for num_received, is_missed in (((0,), True), ((2,), False)):
        query = QueryRequest(client_id=CLIENT, request_id="r", attempt=1, num_received=num_received)
        rig.engine.handle(query, rig.now)
        assert bool(rig.publisher.take(Interrupted)) == is_missed


def test_a_request_for_no_tokens_gets_those_of_its_prompt(folder: Path, expected: Expected) -> None:
    rig = opened(folder, 64)
    message, _ = rig.request(CHAT, "r", sampling=SamplingParams(max_tokens=0, seed=1), items=())
    rig.engine.handle(message, rig.now)
    (accepted,) = rig.publisher.take(Accepted)
    assert unpack_int32(accepted.prompt_token_ids).tolist() == expected.token_ids
    (output,) = rig.outputs()
    assert (output.new_token_ids, output.finish_reason) == (b"", "length")
    assert not rig.engine.step(rig.now), "nothing is computed"
    rig.engine.check_integrity()
    rig.engine.handle(QueryRequest(client_id=CLIENT, request_id="r", attempt=1), rig.now)
    assert rig.publisher.take(Interrupted), "what was asked for is not remembered"
