"""The matcher of a real grammar, token by token, with random choices among what it allows."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence

import jsonschema
import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import Grammar, GrammarKind, SamplingParams
from tests.grammars import MODEL, RandomSchemas, compiled, grammar_of, schema_of, vocabulary
from workers.grammars.compiled import unpack
from workers.llm.sampling.grammar import MAX_SLOW, GrammarMatcher, GrammarRule
from workers.llm.sampling.tokens import TokensSoFar

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
EOS = vocabulary().eos_token_ids
NUM_WORDS = 4082  # the tokens behind are special or padding
NUM_SCHEMAS = 200
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "uuid"])
NOTHING = np.zeros(0, dtype=np.int32)
RULE = GrammarRule(vocabulary())


def start(grammar: Grammar, output: Sequence[int] = (), **fields: object) -> GrammarMatcher:
    params = msgspec.structs.replace(SamplingParams(grammar=grammar), **fields)
    return RULE.start(params, TokensSoFar(NOTHING, np.array(output, dtype=np.int32)), compiled(grammar))


def allowed_array(matcher: GrammarMatcher) -> NDArray[np.intp]:
    bits = np.unpackbits(matcher.allowed(), bitorder="little")
    assert len(bits) == vocabulary().size
    return np.flatnonzero(bits)


def allowed(matcher: GrammarMatcher) -> list[int]:
    return allowed_array(matcher).tolist()


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def draw(matcher: GrammarMatcher, seed: int, most: int = 3000) -> list[int] | None:
    """An answer; None where it has not ended within `most` tokens."""
    rng, output = np.random.default_rng(seed), list[int]()
    while len(output) < most:
        if matcher.is_over:
            return output
        if (token := int(rng.choice(allowed_array(matcher)))) in EOS:
            return output
        output.append(token)
        matcher.accept([token])
    return None


def test_answers_fit_random_schemas() -> None:
    """By another implementation of JSON schemas."""
    num_endless = 0
    for seed in range(NUM_SCHEMAS):
        schema = RandomSchemas(seed).document()
        output = draw(start(schema_of(schema)), seed)
        if output is None:
            num_endless += 1  # within a string without a bound
            continue
        value = json.loads(TOKENIZER.decode(output))
        jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=FORMATS)
    assert num_endless <= 2


REGEX = grammar_of(GrammarKind.REGEX, "[ab]{2,3}x?")


def test_a_grammar_ends_where_it_is_complete_and_nowhere_else() -> None:
    matcher = start(REGEX)
    assert {TOKENIZER.decode([token]) for token in allowed(matcher)} <= {
        "a",
        "b",
        "ab",
        "ba",
        "aa",
        "bb",
        "bab",
        "abb",
    }
    matcher.accept(ids_of("a"))
    assert not set(allowed(matcher)) & set(EOS)
    matcher.accept(ids_of("b"))
    assert set(EOS) < set(allowed(matcher))
    matcher.accept(ids_of("x"))
    assert set(allowed(matcher)) == set(EOS)
    assert not matcher.is_over


def test_special_tokens_and_padding_are_never_part_of_an_answer() -> None:
    matcher = start(grammar_of(GrammarKind.REGEX, "[\\s\\S]*"))
    assert {token for token in allowed(matcher) if token >= NUM_WORDS} == set(EOS)


def test_it_goes_on_behind_the_tokens_of_an_earlier_attempt() -> None:
    grammar = schema_of({"type": "array", "items": {"type": "integer"}, "minItems": 40, "maxItems": 40})
    whole = draw(start(grammar), 1)
    assert whole is not None
    first = start(grammar)
    for cut in range(len(whole)):
        assert allowed(start(grammar, whole[:cut])) == allowed(first)
        first.accept(whole[cut : cut + 1])


@pytest.mark.parametrize("output", ["c", "abx!"])
def test_tokens_of_an_earlier_attempt_that_do_not_fit_are_refused(output: str) -> None:
    with pytest.raises(RequestError, match="keep to the grammar") as error:
        start(REGEX, ids_of(output))
    assert (error.value.info.status, error.value.info.field) == (400, "choices")


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 9}])
def test_where_no_end_may_come_a_complete_grammar_is_over_by_itself(fields: dict[str, object]) -> None:
    matcher = start(REGEX, (), **fields)
    matcher.accept(ids_of("a") + ids_of("b"))
    assert not matcher.is_over
    assert not set(allowed(matcher)) & set(EOS), "it could end, but goes on"
    matcher.accept(ids_of("x"))
    assert matcher.is_over
    with pytest.raises(RequestError, match="further token"):
        start(REGEX, ids_of("a") + ids_of("b") + ids_of("x"), **fields)


def test_ends_are_allowed_from_min_tokens_on() -> None:
    matcher = start(grammar_of(GrammarKind.REGEX, "a*"), min_tokens=3)
    for count in range(5):
        assert bool(set(allowed(matcher)) & set(EOS)) == (count >= 3)
        matcher.accept(ids_of("a"))


def test_stop_token_ids_end_a_complete_grammar_even_if_eos_is_ignored() -> None:
    (stop,) = ids_of("b")
    matcher = start(REGEX, stop_token_ids=(stop,), ignore_eos=True)
    assert stop not in allowed(matcher), "it would end the request too early"
    matcher.accept(ids_of("a") * 2)
    assert stop in allowed(matcher)
    matcher.accept(ids_of("x"))
    assert allowed(matcher) == [stop]
    assert not matcher.is_over


def test_the_masks_behind_guesses_are_those_of_taken_tokens() -> None:
    """Whatever is guessed, the matcher stays where it is."""
    schemas, rng = RandomSchemas(5), np.random.default_rng(5)
    num_masks = 0
    for seed in range(4):
        grammar = schema_of(schemas.document())
        answer = draw(start(grammar, min_tokens=4), seed)
        if answer is None:
            continue
        matcher = start(grammar, min_tokens=4)
        for place, token in enumerate(answer[:20]):
            guesses = [*answer[place : place + int(rng.integers(6))], int(rng.choice(NUM_WORDS)), EOS[0], 5]
            masks = matcher.allowed_behind(guesses)
            num_masks += len(masks)
            beside = start(grammar, answer[:place], min_tokens=4)
            for guess, mask in zip(guesses, masks, strict=False):
                assert guess in allowed(beside)
                beside.accept([guess])
                assert not beside.is_over
                assert np.array_equal(beside.allowed(), mask)
            if len(masks) < len(guesses):
                guess = guesses[len(masks)]
                assert guess in EOS or guess not in allowed(beside) or ends_with(beside, guess)
            assert np.array_equal(matcher.allowed(), start(grammar, answer[:place], min_tokens=4).allowed())
            matcher.accept([token])
    assert num_masks > 60


def ends_with(matcher: GrammarMatcher, token: int) -> bool:
    matcher.accept([token])
    return matcher.is_over


def test_no_guess_is_followed_where_that_takes_long() -> None:
    matcher = start(schema_of({"type": "array"}))
    assert matcher.allowed_behind(ids_of("[1,")) != []
    matcher._num_slow = 1
    assert matcher.allowed_behind(ids_of("[1,")) == []


def test_a_dead_end_by_stop_token_ids_is_told() -> None:
    every = [token for token in range(NUM_WORDS) if TOKENIZER.decode([token]).startswith("b")][:64]
    assert ids_of("b")[0] in every
    matcher = start(grammar_of(GrammarKind.REGEX, "7b"), stop_token_ids=tuple(every))
    matcher.accept(ids_of("7"))
    with pytest.raises(RequestError, match="stop_token_ids"):
        matcher.allowed()


def test_a_wrong_token_is_an_error_of_the_server() -> None:
    with pytest.raises(RequestError) as error:
        start(REGEX).accept(ids_of("x"))
    assert error.value.info.status == 500


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"allowed_token_ids": (5,)}, "allowed_token_ids"),
        ({"banned_token_ids": (b"\5\0\0\0",)}, "bad_words"),
        ({"thinking_budget": 1}, "thinking_budget"),
    ],
)
def test_where_other_parameters_leave_no_token_the_error_names_them(
    fields: dict[str, object], name: str
) -> None:
    with pytest.raises(RequestError, match=name) as error:
        start(REGEX, (), **fields).accept(ids_of("x"))
    assert error.value.info.status == 400


def test_a_grammar_whose_masks_are_slow_again_and_again_is_given_up() -> None:
    ticks = itertools.count()
    params = SamplingParams(grammar=REGEX)
    info = vocabulary().tokenizer_info()
    grammar = grammar_of(GrammarKind.REGEX, "a*")
    matcher = GrammarMatcher(
        unpack(compiled(grammar), info), params, vocabulary(), lambda: (next(ticks) % 4 > 0) * 0.06
    )
    for _ in range(MAX_SLOW - 1):
        matcher.allowed()
        matcher.allowed()  # kept until the next token
        matcher.accept(ids_of("a"))
    with pytest.raises(RequestError, match="50 ms") as error:
        matcher.allowed()
    assert error.value.info.field == "response_format"


def test_a_grammar_that_follows_tokens_slowly_is_given_up() -> None:
    """Its masks are quick, and each token takes longer than the one before."""
    ambiguous = grammar_of(GrammarKind.EBNF, 'root ::= "a" | root root root | root root')
    ticks = itertools.count()
    info, params = vocabulary().tokenizer_info(), SamplingParams(grammar=ambiguous)
    matcher = GrammarMatcher(
        unpack(compiled(ambiguous), info), params, vocabulary(), lambda: next(ticks) * 0.06
    )
    matcher.accept(ids_of("a") * (MAX_SLOW - 1))
    with pytest.raises(RequestError, match="50 ms") as error:
        matcher.accept(ids_of("a"))
    assert (error.value.info.status, error.value.info.field) == (400, "response_format")


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        (GrammarKind.CHOICE, ["one", 'tw"o\\', "dr\ni", "\u00e9\U0001f642", "]"], None),
        (GrammarKind.EBNF, 'root ::= "a" [0-9]+ | "\u00e9"', r"a[0-9]+|\u00e9"),
    ],
)
def test_other_kinds(kind: GrammarKind, source: object, pattern: str | None) -> None:
    for seed in range(20):
        output = draw(start(grammar_of(kind, source)), seed)
        assert output is not None
        text = TOKENIZER.decode(output)
        assert text in source if pattern is None else re.fullmatch(pattern, text)  # type: ignore[operator]


def test_grammars_are_kept_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.llm.sampling.grammar.MAX_KEPT_BYTES", 1)
    rule = GrammarRule(vocabulary())
    for number in range(3):
        grammar = grammar_of(GrammarKind.REGEX, f"[a-z]{{{number + 1}}}")
        rule.start(SamplingParams(grammar=grammar), TokensSoFar(NOTHING, NOTHING), compiled(grammar))
        assert len(rule._kept) == 1
    kept = next(iter(rule._kept.values()))
    assert rule.num_kept_bytes == kept.memory_size_bytes()
    rule.start(SamplingParams(grammar=grammar), TokensSoFar(NOTHING, NOTHING), b"not needed")
