from __future__ import annotations

import hashlib

import msgspec
import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, SamplingParams, with_seed


def test_without_a_seed_the_id_and_the_index_give_one() -> None:
    digest = hashlib.blake2b(b"r1" + bytes([1, 0, 0, 0]), digest_size=8).digest()
    expected = int.from_bytes(digest, "little") & (2**63 - 1)
    params = SamplingParams(top_p=0.9)
    assert with_seed(params, "r1", 1) == SamplingParams(top_p=0.9, seed=expected)
    seeds = {with_seed(params, name, index).seed for name in ("r1", "r2", "r\u00e9") for index in range(32)}
    assert len(seeds) == 96
    assert all(seed is not None and 0 <= seed < 2**63 for seed in seeds)


def test_an_explicit_seed_is_that_of_the_first_choice_and_the_others_follow() -> None:
    params = SamplingParams(seed=2**63 - 2)
    assert with_seed(params, "r1", 0) is params
    assert [with_seed(params, name, 0).seed for name in ("r1", "r2")] == [2**63 - 2] * 2
    assert [with_seed(params, "r1", index).seed for index in (1, 2, 3)] == [2**63 - 1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        (GrammarKind.JSON_SCHEMA, "x" * (MAX_GRAMMAR_BYTES + 1)),
        (GrammarKind.REGEX, "é" * (MAX_GRAMMAR_BYTES // 2 + 1)),
        (GrammarKind.JSON_OBJECT, "{}"),
        (GrammarKind.CHOICE, ""),
        (GrammarKind.CHOICE, "[]"),
        (GrammarKind.CHOICE, '["a", ""]'),
        (GrammarKind.CHOICE, '["a", 1]'),
        (GrammarKind.CHOICE, msgspec.json.encode(["a"] * 1025).decode()),
    ],
)
def test_a_grammar_that_is_obviously_wrong_is_refused_where_it_is_made(
    kind: GrammarKind, source: str
) -> None:
    with pytest.raises(RequestError) as error:
        Grammar(kind, source, "guided_choice")
    assert error.value.info.field == "guided_choice"


def test_a_grammars_digest_is_of_its_kind_and_source() -> None:
    digests = {
        Grammar(kind, source).digest
        for kind in (GrammarKind.EBNF, GrammarKind.REGEX)
        for source in ("a", "b")
    }
    assert len(digests) == 4
    assert Grammar(GrammarKind.REGEX, "a", "guided_regex").digest in digests


@pytest.mark.parametrize(
    ("given", "max_tokens", "kept"),
    [(None, 5, None), (7, 5, 7), (100, 5, 100), (-1, 5, 95), (-1, None, 99), (-1, 0, 100)],
)
def test_so_many_of_the_prompts_last_tokens_are_kept(
    given: int | None, max_tokens: int | None, kept: int | None
) -> None:
    sampling = SamplingParams(truncate_prompt_tokens=given, max_tokens=max_tokens)
    assert sampling.num_kept_of_prompt(100) == kept


@pytest.mark.parametrize(("given", "max_tokens"), [(101, 5), (-1, 100), (0, 5), (-2, 5), (2**31, 5)])
def test_a_number_of_kept_tokens_that_no_prompt_can_have_is_refused(given: int, max_tokens: int) -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(truncate_prompt_tokens=given, max_tokens=max_tokens).num_kept_of_prompt(100)
    assert error.value.info.field == "truncate_prompt_tokens"
