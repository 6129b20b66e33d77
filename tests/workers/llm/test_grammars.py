"""Real grammars through engine, scheduler and runner, beside requests without one."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from pipeline.families import read_model_info
from pipeline.wire.clients import ChoiceProgress, RequestFailed, TokenOutputs
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import FinishReason, Grammar, GrammarKind, SamplingParams
from pipeline.wire.steps import StepPlan
from tests.fakes import PREPROCESS
from tests.grammars import grammar_of, schema_of
from tests.workers.llm.speculation.guesses import drafter_of
from tests.workers.llm.test_matching import CLIENT, FREE, PROMPTS, Rig
from workers.grammars.vocabulary import GrammarVocabulary
from workers.llm.matcher_starts import MatcherStarts
from workers.llm.sampling.grammar import GrammarRule
from workers.preprocess.grammar_process import Compiled, Compiler

SCHEMA = {
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"type": "array", "items": {"enum": ["x", "yy", None]}, "minItems": 2, "maxItems": 5},
        "c": {"type": "string", "maxLength": 4},
    },
    "required": ["a", "b", "c"],
}
GREEDY = SamplingParams(temperature=0, max_tokens=120, seed=1)
WANTED = {
    "ruled": msgspec.structs.replace(GREEDY, grammar=schema_of(SCHEMA)),
    "free": FREE,
    "ruled too": msgspec.structs.replace(
        GREEDY, temperature=1.0, grammar=grammar_of(GrammarKind.REGEX, "[ab]{5}(-[0-9]{3}){4}")
    ),
    "free too": FREE,
}


class End(NamedTuple):
    tokens: list[int]
    reason: FinishReason | None


class Runs:
    """Engines with one checkpoint, whose requests are told with their finish reasons."""

    def __init__(self, folder: Path) -> None:
        info = read_model_info(folder)
        self.folder, self.eos = folder, info.eos_token_ids
        self.vocabulary = GrammarVocabulary(folder, info.text.vocab_size, info.eos_token_ids)
        self._compiler = Compiler(self.vocabulary, 2048)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def compiled(self, grammar: Grammar | None) -> bytes:
        if grammar is None:
            return b""
        answer = self._compiler.handle(grammar)
        assert isinstance(answer, Compiled), answer
        return answer.data

    def starts(self, *options: Any) -> MatcherStarts:
        return MatcherStarts([GrammarRule(self.vocabulary)], *options)

    def rig(self, *args: Any, starts: MatcherStarts | None = None, **options: Any) -> Rig:
        return Rig(self.folder, *args, starts=starts or self.starts(), **options)

    def submit(
        self, rig: Rig, name: str, params: SamplingParams, outputs: Sequence[Sequence[int]] = ()
    ) -> None:
        prompt = PROMPTS[name]
        request = GenerateRequest(
            sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=name, attempt=1 + bool(outputs),
            arrival=len(rig.engine.requests) + 1, prompt_token_ids=pack_int32(prompt),
            positions=pack_int32([*range(len(prompt))] * 3), position_delta=0, items=(), sampling=params,
            choices=tuple(ChoiceProgress(pack_int32(output)) for output in outputs),
        )  # fmt: skip
        frames = [memoryview(data)] if (data := self.compiled(params.grammar)) else []
        rig.engine.handle(request, 0.0, frames)

    def finish(self, rig: Rig) -> dict[tuple[str, int], End]:
        """The new tokens of each choice, and how it ended."""
        found: dict[tuple[str, int], End] = {}
        is_busy = True
        while is_busy:
            is_busy = rig.engine.step(0.0)
            rig.engine.check_integrity()
            for message in rig.publisher.take(TokenOutputs):
                for output in message.outputs:
                    key = output.request_id, output.index
                    tokens, _ = found.get(key, End([], None))
                    new = unpack_int32(output.new_token_ids).tolist()
                    found[key] = End(tokens + new, output.finish_reason)
        return found

    def answers(
        self, wanted: Mapping[str, SamplingParams], *args: Any, **options: Any
    ) -> dict[tuple[str, int], End]:
        rig = self.rig(*args, **options)
        for name, params in wanted.items():
            self.submit(rig, name, params)
        return self.finish(rig)

    def text(self, end: End) -> str:
        assert end.reason is FinishReason.STOP
        text: str = self.tokenizer.decode(end.tokens)
        return text


@pytest.fixture(scope="module")
def runs(random_checkpoint: Path) -> Runs:
    return Runs(random_checkpoint)


@pytest.fixture(scope="module")
def expected(runs: Runs) -> dict[tuple[str, int], End]:
    return runs.answers(WANTED, has_overlap=False)


def test_what_is_ruled_fits_and_what_is_free_is_as_ever(
    runs: Runs, expected: dict[tuple[str, int], End]
) -> None:
    jsonschema.validate(json.loads(runs.text(expected["ruled", 0])), SCHEMA)
    assert len(runs.text(expected["ruled too", 0])) == 21
    free = runs.answers(
        {name: params for name, params in WANTED.items() if params is FREE}, has_overlap=False
    )
    assert {key: expected[key] for key in free} == free


@pytest.mark.parametrize(
    ("budget", "num_blocks", "has_overlap"),
    [(512, 100, True), (7, 100, True), (512, 25, True), (7, 25, False)],
)
def test_chunks_preemption_and_overlap_change_nothing(
    runs: Runs, expected: dict[tuple[str, int], End], budget: int, num_blocks: int, has_overlap: bool
) -> None:
    rig = runs.rig(budget, num_blocks, has_overlap=has_overlap)
    for name, params in WANTED.items():
        runs.submit(rig, name, msgspec.structs.replace(params, max_tokens=min(params.max_tokens or 0, 80)))
    assert runs.finish(rig) == expected
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100 and budget > 7)


@pytest.mark.parametrize(("num_blocks", "max_rows"), [(100, 64), (100, 7), (30, 64)])
def test_guesses_change_nothing(
    runs: Runs, expected: dict[tuple[str, int], End], num_blocks: int, max_rows: int
) -> None:
    """Right ones, and wrong ones that the grammar may or may not allow."""
    drafter = drafter_of([[*PROMPTS[name], *end.tokens] for (name, _), end in expected.items()], 9, max_rows)
    short = {
        name: msgspec.structs.replace(params, max_tokens=min(params.max_tokens or 0, 80))
        for name, params in WANTED.items()
    }
    assert runs.answers(short, 40, num_blocks, has_overlap=False, drafter=drafter) == expected
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 40


def test_a_grammar_that_ends_without_a_token_ends_with_guesses_too(runs: Runs) -> None:
    """Nothing is drafted behind its end."""
    for changes in ({"ignore_eos": True}, {"min_tokens": 30}, {"min_tokens": 9, "stop_token_ids": (40,)}):
        params = msgspec.structs.replace(WANTED["ruled too"], **changes)
        plain = runs.answers({"ruled too": params})
        text = [*PROMPTS["ruled too"], *plain["ruled too", 0].tokens]
        drafter = drafter_of([[*text, *range(40, 50)]])
        assert runs.answers({"ruled too": params}, has_overlap=False, drafter=drafter) == plain
        assert drafter.counters["spec_decode_num_accepted_tokens"] > 5


def test_choices_have_matchers_of_their_own_and_logprobs(runs: Runs) -> None:
    params = msgspec.structs.replace(WANTED["ruled"], n=3, temperature=1.5, logprobs=1)
    found = runs.answers({"ruled": params})
    texts = [runs.text(found["ruled", index]) for index in range(3)]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize("cut", [0, 1, 9, -1])
def test_the_next_attempt_goes_on_in_the_middle(
    runs: Runs, expected: dict[tuple[str, int], End], cut: int
) -> None:
    for name in ("ruled", "ruled too"):
        whole = expected[name, 0].tokens[:-1]  # without the one that ended it
        before = whole[:cut]
        rig = runs.rig()
        runs.submit(rig, name, WANTED[name], [before])
        found = runs.finish(rig)[name, 0]
        assert before + found.tokens == expected[name, 0].tokens


def test_other_ranks_never_see_a_grammar(runs: Runs) -> None:
    rig = runs.rig()
    runs.submit(rig, "ruled", WANTED["ruled"])
    runs.finish(rig)
    starts = [start for plan in rig.steps if isinstance(plan, StepPlan) for start in plan.started]
    assert [start.sampling.grammar for start in starts] == [None]
    assert starts[0].is_masked


@pytest.mark.parametrize(
    "fields",
    [
        {"ignore_eos": True},
        {"min_tokens": 100},
        {"min_tokens": 120, "temperature": 1.5},
        {"logit_bias": dict.fromkeys(range(100), -100.0), "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"repetition_penalty": 100.0, "temperature": 2.0, "top_k": 2, "top_p": 0.1, "min_p": 1.0},
    ],
)
@pytest.mark.parametrize("has_overlap", [False, True])
def test_no_other_parameter_leads_out_of_the_grammar(
    runs: Runs, fields: dict[str, Any], has_overlap: bool
) -> None:
    params = msgspec.structs.replace(WANTED["ruled"], **fields)
    found = runs.answers({"ruled": params, "free": FREE}, has_overlap=has_overlap)
    jsonschema.validate(json.loads(runs.text(found["ruled", 0])), SCHEMA)
    if "ignore_eos" in fields or "min_tokens" in fields:
        assert found["ruled", 0].tokens[-1] not in runs.eos, "it is over without a token for that"


@pytest.mark.parametrize("has_overlap", [False, True])
def test_a_matcher_that_fails_ends_its_request_and_no_other(
    runs: Runs, expected: dict[tuple[str, int], End], has_overlap: bool
) -> None:
    tokens = [token for token in range(4082) if runs.tokenizer.decode([token]).startswith("b")][:64]
    dead_end = grammar_of(GrammarKind.REGEX, "7777b")
    params = msgspec.structs.replace(GREEDY, grammar=dead_end, stop_token_ids=tuple(tokens))
    rig = runs.rig(has_overlap=has_overlap)
    runs.submit(rig, "ruled", params)
    runs.submit(rig, "free", FREE)
    found = runs.finish(rig)
    (failed,) = rig.publisher.take(RequestFailed)
    assert (failed.request_id, failed.error.status) == ("ruled", 400)
    assert "stop_token_ids" in failed.error.message
    assert found["free", 0] == expected["free", 0]
    assert not rig.engine.requests


def test_tokens_of_a_client_that_do_not_fit_end_its_request(runs: Runs) -> None:
    rig = runs.rig()
    runs.submit(rig, "ruled", WANTED["ruled"], [[5, 6, 7]])
    runs.finish(rig)
    (failed,) = rig.publisher.take(RequestFailed)
    assert (failed.error.status, failed.error.field) == (400, "choices")


def test_others_run_while_a_thread_starts_matchers(runs: Runs, expected: dict[tuple[str, int], End]) -> None:
    may_start, woken = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(may_start.wait)
        rig = runs.rig(starts=runs.starts(executor, woken.set))
        runs.submit(rig, "ruled", WANTED["ruled"])
        runs.submit(rig, "free", FREE)
        found = runs.finish(rig)
        assert found == {("free", 0): expected["free", 0]}
        assert not woken.is_set()
        may_start.set()
        assert woken.wait(10)
        assert runs.finish(rig) == {("ruled", 0): expected["ruled", 0]}


def test_a_request_that_is_aborted_meanwhile_is_forgotten(runs: Runs) -> None:
    may_start, woken = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(may_start.wait)
        rig = runs.rig(starts=runs.starts(executor, woken.set))
        runs.submit(rig, "ruled", WANTED["ruled"])
        rig.engine.step(0.0)
        rig.engine._requests.abort(rig.engine.requests["ruled"], 0.0)
        may_start.set()
        assert woken.wait(10)
        assert not rig.engine.step(0.0)
        rig.engine.check_integrity()
