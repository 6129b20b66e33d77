from __future__ import annotations

import random
from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from tools.bench_serving import Result
from tools.peers.load import Texts, check_same_length, decode_rate


def stream(arrivals: list[float], num_tokens: int) -> Result:
    return Result(sent=0.0, arrivals=arrivals, num_output_tokens=num_tokens)


def test_streams_are_timed_while_all_of_them_run() -> None:
    first = stream([1.0, 2.0, 3.0, 4.0], 4)
    second = stream([2.5, 3.5, 4.5, 5.5], 4)
    # From 2.5 to 4.0: those at 3.0 and 4.0, and that at 3.5.
    assert decode_rate([first, second]) == pytest.approx(3 / 1.5)


def test_one_stream_is_timed_from_its_first_token() -> None:
    assert decode_rate([stream([1.0, 2.0, 3.0], 3)]) == pytest.approx(1.0)


def test_an_event_may_have_several_tokens() -> None:
    assert decode_rate([stream([1.0, 2.0, 3.0], 5)]) == pytest.approx(2.0)


def test_streams_one_after_the_other_are_timed_together() -> None:
    one, other = stream([1.0, 2.0], 2), stream([3.0, 4.0], 2)
    assert decode_rate([one, other]) == pytest.approx(3 / 3.0)


def test_texts_have_the_tokens_that_were_asked_for() -> None:
    texts = Texts(EMBEDDED / "model", random.Random(1))
    (part,) = texts.text(20)
    assert len(part["text"].split()) == 20
    picture, text = texts.picture()
    assert picture["type"] == "image_url"
    assert text["type"] == "text"
    assert texts.picture()[0] != picture


def test_a_picture_that_a_server_made_smaller_is_no_match() -> None:
    seen = Result(sent=0.0, num_prompt_tokens=283)
    check_same_length(seen, Result(sent=0.0, num_prompt_tokens=285))
    with pytest.raises(RuntimeError, match="283 tokens with a picture, 300"):
        check_same_length(seen, Result(sent=0.0, num_prompt_tokens=300))


def test_the_marks_of_a_picture_count(tmp_path: Path) -> None:
    texts = Texts(EMBEDDED / "model", random.Random(1))
    assert texts.tokens_of_picture == (448 // 28) ** 2 + 2
