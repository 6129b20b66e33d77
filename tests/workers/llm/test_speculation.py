"""Drafts through engine, scheduler, cache and runner: every text is what it is without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from pipeline.wire.clients import ChoiceProgress
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.chats import CHATS
from tests.engine_rig import CLIENT, NUM_TOKENS, Rig
from tests.fakes import PREPROCESS
from tests.reference import Answer, Reference, assert_same_tokens
from tests.workers.llm.speculation.guesses import drafter_of
from workers.llm.speculation.drafter import Drafter
from workers.llm.speculation.ngram import NgramProposer

GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, seed=1)
DRAWN = msgspec.structs.replace(GREEDY, temperature=0.9, top_p=0.95)


def with_(params: SamplingParams, **changes: object) -> SamplingParams:
    return msgspec.structs.replace(params, **changes)


WANTED = {
    "greedy": GREEDY,
    "drawn": with_(DRAWN, n=2, logprobs=2),
    "top k": with_(DRAWN, top_k=5, min_p=0.01, seed=7),
    "logprobs": with_(GREEDY, logprobs=3, prompt_logprobs=1),
    "penalties": with_(DRAWN, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.2),
    "bias": with_(GREEDY, logit_bias={50: 3.0, 60: 4.0}, allowed_token_ids=tuple(range(20, 90))),
    "thoughts": with_(DRAWN, thinking_budget=11, thinking_end=(70, 71, 72)),
}


class Told(NamedTuple):
    """What a client is told of one choice."""

    tokens: list[int]
    reason: FinishReason | None
    logprob_token_ids: list[list[int]]
    logprobs: list[list[float]]


def submit(
    rig: Rig, name: str, params: SamplingParams, choices: Sequence[ChoiceProgress] = (), context: int = 0
) -> None:
    number = len(rig.engine.requests)
    prompt = [5 + (7 * number + step * step) % 83 for step in range(9 + 4 * number + context)]
    request = GenerateRequest(
        sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=name, attempt=1 + bool(choices),
        arrival=number + 1, prompt_token_ids=pack_int32(prompt),
        positions=pack_int32([*range(len(prompt))] * 3), position_delta=0, items=(), sampling=params,
        choices=tuple(choices),
    )  # fmt: skip
    rig.engine.handle(request, 0.0)


def finish(rig: Rig) -> dict[tuple[str, int], Told]:
    rig.run()
    found: dict[tuple[str, int], Told] = {}
    for output in rig.outputs():
        told = found.setdefault((output.request_id, output.index), Told([], None, [], []))
        assert output.offset >= len(told.tokens)
        told.tokens.extend(unpack_int32(output.new_token_ids).tolist())
        told.logprob_token_ids.extend(unpack_int32(one.token_ids).tolist() for one in output.logprobs)
        told.logprobs.extend(np.frombuffer(one.logprobs, dtype="<f4").tolist() for one in output.logprobs)
        found[output.request_id, output.index] = told._replace(reason=output.finish_reason)
    return found


def assert_same(found: Mapping[tuple[str, int], Told], expected: Mapping[tuple[str, int], Told]) -> None:
    assert found.keys() == expected.keys()
    for key, told in found.items():
        wanted = expected[key]
        assert (told.tokens, told.reason) == (wanted.tokens, wanted.reason), key
        for values, others in zip(told.logprobs, wanted.logprobs, strict=True):
            assert values == pytest.approx(others, abs=1e-4), key
        num_ties = 0
        for ids, of_others in zip(told.logprob_token_ids, wanted.logprob_token_ids, strict=True):
            assert ids[:-1] == of_others[:-1], key
            num_ties += ids != of_others  # the last one, with that behind it, which is not told
        assert num_ties <= 1, key


def submit_again(rig: Rig, expected: Mapping[tuple[str, int], Told]) -> None:
    """The next attempts of all kinds of requests, whose choices have some tokens already."""
    for name, params in WANTED.items():
        so_far = [
            ChoiceProgress(pack_int32(told.tokens[: 3 + 9 * index]))
            for (request_id, index), told in expected.items()
            if request_id == name
        ]
        submit(rig, name, with_(params, prompt_logprobs=None), so_far)


def assert_go_on(found: Mapping[tuple[str, int], Told], expected: Mapping[tuple[str, int], Told]) -> None:
    """After `submit_again`."""
    for key, told in found.items():
        assert told.tokens == expected[key].tokens[3 + 9 * key[1] :], key


def texts_of(rig: Rig, told: Mapping[tuple[str, int], Told]) -> list[list[int]]:
    """Prompts and answers of the rig's requests, for guesses."""
    prompts = {name: choices.all[0].prompt_token_ids for name, choices in rig.engine.requests.items()}
    return [[*prompts[name], *one.tokens] for (name, _), one in told.items() if name in prompts]


@pytest.fixture(scope="module")
def expected(random_checkpoint: Path) -> dict[tuple[str, int], Told]:
    rig = Rig(random_checkpoint, 512, block_size=4)
    for name, params in WANTED.items():
        submit(rig, name, params)
    return finish(rig)


@pytest.fixture(scope="module")
def references(random_checkpoint: Path) -> dict[str, Answer]:
    reference = Reference(random_checkpoint)
    names = ("text only", "one picture", "three pictures between texts")
    return {name: reference.answer(CHATS[name], NUM_TOKENS) for name in names}


def drafted(rig: Rig, expected: Mapping[tuple[str, int], Told], max_rows: int = 64) -> Drafter:
    """Gives the rig's requests good guesses."""
    rig.scheduler.drafter = drafter_of(texts_of(rig, expected), max_rows=max_rows)
    return rig.scheduler.drafter


@pytest.mark.parametrize(
    ("budget", "num_blocks", "max_rows"),
    [(512, 600, 64), (512, 600, 12), (11, 600, 64), (512, 85, 64), (20, 60, 64)],
    ids=["free", "few rows", "chunks", "little memory", "chunks in less memory"],
)
def test_every_kind_of_sampling_gives_the_same(
    budget: int, num_blocks: int, max_rows: int, random_checkpoint: Path,
    expected: dict[tuple[str, int], Told],
) -> None:  # fmt: skip
    rig = Rig(random_checkpoint, budget, block_size=4, num_blocks=num_blocks)
    for name, params in WANTED.items():
        submit(rig, name, params)
    drafter = drafted(rig, expected, max_rows)
    assert_same(finish(rig), expected)
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 40
    assert (
        drafter.counters["spec_decode_num_draft_tokens"] > drafter.counters["spec_decode_num_accepted_tokens"]
    )
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100)
    assert not drafter._drafted


def test_good_guesses_save_steps(random_checkpoint: Path, expected: dict[tuple[str, int], Told]) -> None:
    rig = Rig(random_checkpoint, 512)
    submit(rig, "greedy", GREEDY)
    drafted(rig, expected)
    assert_same(finish(rig), {("greedy", 0): expected["greedy", 0]})
    assert rig.engine.counters["steps"] < 20
    assert rig.engine.counters["generation_tokens"] == 40


@pytest.mark.parametrize("name", ["text only", "one picture", "three pictures between texts"])
@pytest.mark.parametrize("budget", [512, 9])
def test_pictures_and_their_positions(
    budget: int, name: str, random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    """Behind pictures, positions are not indices. Another request prefills beside it, in chunks."""
    answer = references[name]
    texts = [[*answer.prompt_token_ids, *answer.token_ids] for answer in references.values()]
    rig = Rig(random_checkpoint, budget, 4, drafter=drafter_of(texts))
    rig.open_pool()
    for number, chat in enumerate((name, "three pictures between texts")):
        request, ready = rig.request(CHATS[chat], f"r{number}")
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
        for _ in range(8):
            rig.engine.step(rig.now)
    rig.run()
    outputs = rig.outputs()
    for number, wanted in enumerate((answer, references["three pictures between texts"])):
        mine = [output for output in outputs if output.request_id == f"r{number}"]
        tokens = [token for output in mine for token in unpack_int32(output.new_token_ids).tolist()]
        assert_same_tokens(tokens, wanted, name)
    assert rig.scheduler.drafter is not None
    assert rig.scheduler.drafter.counters["spec_decode_num_accepted_tokens"] > 4


@pytest.mark.parametrize("place", [4, 5, 6, 7, 8, 17])
def test_the_end_may_be_among_the_accepted_tokens(
    place: int, random_checkpoint: Path, expected: dict[tuple[str, int], Told]
) -> None:
    """A token that ends the text, and `max_tokens`: what was accepted behind it is dropped, logprobs too."""
    tokens = expected["drawn", 0].tokens
    for changes, length, reason in (
        ({"stop_token_ids": (tokens[place],)}, tokens.index(tokens[place]) + 1, FinishReason.STOP),
        ({"stop_token_ids": (tokens[place],), "min_tokens": 3}, None, FinishReason.STOP),
        ({"max_tokens": place + 1}, place + 1, FinishReason.LENGTH),
    ):
        told = []
        for guesses in (False, True):
            rig = Rig(random_checkpoint, 512, block_size=4)
            submit(rig, "greedy", GREEDY)  # so that "drawn" has the same prompt as ever
            submit(rig, "drawn", with_(WANTED["drawn"], **changes))
            if guesses:
                drafted(rig, expected)
            told.append(finish(rig))
        assert_same(told[1], told[0])
        ended = told[1]["drawn", 0]
        assert len(ended.logprobs) == len(ended.tokens)
        if length is not None:
            assert (ended.tokens, ended.reason) == (tokens[:length], reason)


def test_the_next_attempt_goes_on_with_guesses(
    random_checkpoint: Path, expected: dict[tuple[str, int], Told]
) -> None:
    rig = Rig(random_checkpoint, 30, block_size=4)
    submit_again(rig, expected)
    drafter = drafted(rig, expected)
    assert_go_on(finish(rig), expected)
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 40


def test_n_grams_of_a_text_that_repeats_itself(random_checkpoint: Path) -> None:
    """As a server proposes: a prompt that repeats, and answers that repeat, by a bias."""
    found = []
    for drafter in (None, Drafter(NgramProposer, 15)):
        rig = Rig(random_checkpoint, 200, drafter=drafter)
        likely = dict.fromkeys((31, 32, 33), 30.0)
        submit(rig, "greedy", with_(GREEDY, logit_bias=likely, max_tokens=60), context=400)
        submit(rig, "drawn", with_(DRAWN, logit_bias=likely, max_tokens=60), context=400)
        found.append(finish(rig))
    assert_same(found[1], found[0])
    assert drafter is not None
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 10


@pytest.mark.interpreter
def test_the_way_of_a_gpu_gives_the_same(
    random_checkpoint: Path, expected: dict[tuple[str, int], Told]
) -> None:
    """Decodes with drafts are not for the graphs; those without are, before and after."""
    rig = Rig(random_checkpoint, 512, attention="triton")
    wanted = {name: with_(WANTED[name], max_tokens=9) for name in ("greedy", "drawn")}
    for name, params in wanted.items():
        submit(rig, name, params)
    drafter = drafted(rig, expected)
    found = finish(rig)
    assert {key: told.tokens for key, told in found.items()} == {
        key: expected[key].tokens[:9] for key in found
    }
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 0
