from __future__ import annotations

import random
import time

import pytest
from tokenizers import AddedToken, Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.client.detokenizer import Detokenizer, StopStrings
from pipeline.client.tags import special_tags


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json"))


TEXTS = [
    "A red circle at the top left.",
    "naïve café — 你好，世界 🙂🙃",
    "  leading blanks\n\nlines\t",
    "🇫🇷👩‍👩‍👧",
    "",
    "x",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 7])
def test_pieces_add_up_to_the_whole(text: str, size: int, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    made = Detokenizer(tokenizer)
    pieces = [
        made.add(ids[start : start + size], is_last=start + size >= len(ids))
        for start in range(0, len(ids), size)
    ]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂", add_special_tokens=False).ids
    assert len(ids) > 1
    made = Detokenizer(tokenizer)
    assert made.add(ids[:-1]) == ""
    assert made.add([], is_last=True) == tokenizer.decode(ids[:-1])


def test_random_ids_give_what_decoding_at_once_gives(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(14, 4096) for _ in range(40)]
        made = Detokenizer(tokenizer)
        pieces = [made.add([token], is_last=number == 39) for number, token in enumerate(ids)]
        whole = tokenizer.decode(ids)
        assert "".join(pieces).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("<|im_end|>")
    ids = tokenizer.encode("A circle.", add_special_tokens=False).ids
    made = Detokenizer(tokenizer)
    assert made.add(ids) + made.add([end], is_last=True) == "A circle."


@pytest.mark.parametrize("waiting", ["<|im_end|>", "\ufffd"])
def test_many_tokens_without_text_cost_no_more_than_others(waiting: str, tokenizer: Tokenizer) -> None:
    """A request with a bias for one token, and without an end, is made of nothing else."""
    ids = tokenizer.encode(waiting, add_special_tokens=False).ids[-1:] * 8000
    after = tokenizer.encode(" and a circle", add_special_tokens=False).ids
    made = Detokenizer(tokenizer)
    start = time.process_time()
    text = made.add(ids) + made.add(after, is_last=True)
    assert time.process_time() - start < 1.0
    assert text == tokenizer.decode([*ids, *after])


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "hit"),
    [
        (["hello world"], ["wor"], "hello ", True),
        (["he", "ll", "o w", "or", "ld"], ["wor"], "hello ", True),
        (["ab", "ab", "ac"], ["abac"], "ab", True),
        (["aab"], ["b", "ab"], "a", True),
        (["no stop he", "re"], ["here!"], "no stop here", False),
        (["ends with wo"], ["wor"], "ends with wo", False),
        (["stop"], ["stop"], "", True),
    ],
)
def test_stop_strings(pieces: list[str], stop: list[str], shown: str, hit: bool) -> None:
    made = StopStrings(stop)
    out = "".join(made.add(piece, number == len(pieces) - 1) for number, piece in enumerate(pieces))
    assert (out, made.hit is not None) == (shown, hit)
    assert made.add("more", True) == ("" if hit else "more")


def test_nothing_that_may_become_a_stop_string_is_shown_early() -> None:
    made = StopStrings(["STOP"])
    assert [made.add(piece) for piece in ("a", "S", "T", "x", "S")] == ["a", "", "", "STx", ""]


@pytest.mark.parametrize("is_special", [False, True])
def test_tags_are_not_left_out(is_special: bool, tokenizer: Tokenizer) -> None:
    """An added token that is no special one is text; a special one is, if it is among the kept ones."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.add_tokens([AddedToken("<tool_call>", special=is_special, normalized=False)])
    tag = own.token_to_id("<tool_call>")
    ids = own.encode("é 🙂<tool_call>{}", add_special_tokens=False).ids
    assert tag in ids
    kept = {tag: "<tool_call>"} if is_special else {}
    made = Detokenizer(own, kept=kept)
    assert "".join(made.add([one]) for one in ids) == "é 🙂<tool_call>{}"
    assert special_tags(own) == kept
    end = own.token_to_id("<|im_end|>")
    assert made.add([end], is_last=True) == ""
