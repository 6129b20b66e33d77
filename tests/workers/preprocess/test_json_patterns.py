"""What a pattern allows is the text of a string in JSON."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from pipeline.wire.sampling import SamplingParams
from tests.grammars import MODEL, compiled, schema_of, vocabulary
from workers.grammars.compiled import unpack
from workers.llm.sampling.grammar import GrammarMatcher
from workers.preprocess.json_patterns import in_json, with_open_side

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
ANY = schema_of({"type": "string"})
NUM_PATTERNS = 120
PIECES = (
    "a", '"', r"\\", r"\n", r"\t", r"\x22", r"\u005c", '[a"]', '["]', r'[\\"]', "[ -~]", r"[\t-z]", "[\t-~]",
    "[^a]", '[^"]', ".", r"\s", r"\S", r"\W", r"\D", r"[\x00-\x1f]", r"\/", r"[\n\r]", r'[\]"]', r'[\w"-]',
    r"[^\t-~]", r"[\s\S]", r"[\S ]", r"[\W]", "[^a-]", r"[\s-]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        (r"^\d{3}-\w(?:a|b)?$", r"^\d{3}-\w(?:a|b)?$"),
        (r"^C:\\\w$", r"^C:(?:\\\\)\w$"),
        (r'"\x0b\cJ', r'(?:\\")(?:\\u000b)(?:\\n)'),
        (r"[\[-\]-]", r"[\u005b\u005d\-]"),
        (r"[\\]", r"(?:\\\\)"),
        (r"[^a-]", r'[^a\-"\\\x00-\x1f]'),
        (r"[\d\D]", r'[^"\\\x00-\x1f]'),
        ("a\\", "a\\"),
    ],
)
def test_what_must_be_escaped_is_an_escape(pattern: str, written: str) -> None:
    assert in_json(pattern) == written


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("^https://", r"^https://[\s\S]*"),
        ("[.]png$", r"[\s\S]*[.]png$"),
        (r"^\$", r"^\$[\s\S]*"),
        (r"^a(b|c)[|]", r"^a(b|c)[|][\s\S]*"),
        ("^a$", "^a$"),
        ("[0-9]{5}", "[0-9]{5}"),
        ("^a|b$", "^a|b$"),
        ("^a|b", "^a|b"),
        ("", ""),
    ],
)
def test_where_one_side_alone_is_anchored_the_other_is_open(pattern: str, written: str) -> None:
    assert with_open_side(pattern) == written


@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ('"https://red.example/a b"', True),
        ('"http://"', True),
        ('"ftp://red"', False),
        ('"a https://"', False),
    ],
)
def test_an_open_side_takes_further_characters(answer: str, fits: bool) -> None:
    data = compiled(schema_of({"type": "string", "pattern": "^https?://"}))
    matcher = GrammarMatcher(
        unpack(data, vocabulary().tokenizer_info()), SamplingParams(grammar=ANY), vocabulary()
    )
    assert matcher.follow(TOKENIZER.encode(answer, add_special_tokens=False).ids) is fits


def test_answers_are_json_whatever_the_pattern() -> None:
    rng, num_answers = random.Random(1), 0
    for seed in range(NUM_PATTERNS):
        pattern = f"^{''.join(_drawn(rng) for _ in range(rng.randrange(1, 5)))}$"
        data = compiled(schema_of({"type": "string", "pattern": pattern}))
        matcher = GrammarMatcher(
            unpack(data, vocabulary().tokenizer_info()), SamplingParams(grammar=ANY), vocabulary()
        )
        if (answer := _answer(matcher, np.random.default_rng(seed))) is not None:
            num_answers += 1
            assert "\\W" in pattern or re.search(pattern, json.loads(answer)), "Python's \\W has no é"
            assert isinstance(json.loads(answer), str)
    assert num_answers > NUM_PATTERNS / 2


def _drawn(rng: random.Random) -> str:
    piece = rng.choice(PIECES) + rng.choice(["", "", "?", "*", "{1,2}", "+"])
    return piece if rng.random() < 0.75 else f"({piece}|{rng.choice(PIECES)}){rng.choice(['', '?'])}"


def _answer(matcher: GrammarMatcher, rng: np.random.Generator) -> str | None:
    output: list[int] = []
    while len(output) < 40:
        allowed = np.flatnonzero(np.unpackbits(matcher.allowed(), bitorder="little"))
        ends = [token for token in allowed if token in vocabulary().eos_token_ids]
        if ends:
            return str(TOKENIZER.decode(output))
        output.append(int(rng.choice(allowed)))
        matcher.accept(output[-1:])
    return None
