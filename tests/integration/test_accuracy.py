"""The embedded model is as often right through the server, in OpenAI's protocol, as it is in transformers:
also from the caches."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence

import pytest
from openai import OpenAI

from launcher.checkpoints import EMBEDDED
from tests.integration.conftest import LIMITS
from tests.servers import Server
from tools.tiny_model.evaluate import Answer, Transformers, ask_server
from tools.tiny_model.exams import SKILLS, Exam, exams

ONE_OF_EACH_SKILL = slice(None, None, 2)
# Options, which are asked, and the most differences of these.
SETUPS = {
    "float32": (("--dtype", "float32"), slice(None), 0.0),
    "ViT on onnxruntime": (("--dtype", "float32", "--vit-engine", "onnxruntime"), ONE_OF_EACH_SKILL, 0.01),
    "bfloat16": (("--dtype", "bfloat16"), ONE_OF_EACH_SKILL, 0.04),
    "int8": (("--quantization", "int8"), ONE_OF_EACH_SKILL, 0.04),
    "int4": (("--quantization", "int4"), ONE_OF_EACH_SKILL, 0.1),
}

SAMPLES = {
    "red-star": ("What shape is in the picture?", "A star."),
    "three-shapes": (
        "What is in this picture?",
        "A blue cross at the top, a yellow ring on the left, a red heart on the right.",
    ),
    "blank": ("What do you see?", "The picture is empty."),
    "number": ("What number is shown?", "427."),
    "word": ("What word is shown?", "Open."),
    "chart": ("Which bar is the highest?", "The blue bar."),
    "emoji": ("What emoji is this?", "A car."),
}


@pytest.fixture(scope="module")
def asked() -> list[Exam]:
    return exams(list(SKILLS), 2)


@pytest.fixture(scope="module")
def right(asked: list[Exam]) -> list[bool]:
    judge = Transformers(EMBEDDED / "model")
    return [judge.is_right(exam) for exam in asked]


def test_it_is_mostly_right_in_transformers(right: list[bool]) -> None:
    """Or being right in the same cases would say little.

    docs/embedded-model.md has the figures of far more questions.
    """
    assert sum(right) >= 0.9 * len(right)


@pytest.mark.parametrize("setup", SETUPS)
def test_right_where_transformers_is_right(setup: str, asked: list[Exam], right: list[bool]) -> None:
    """In float32 also from the caches."""
    options, chosen, most_differences = SETUPS[setup]
    asked, right = asked[chosen], right[chosen]
    with Server(*options, *LIMITS) as server:
        answers = asyncio.run(ask_server(server.url, asked))
        assert _differences(answers, asked, right) <= most_differences * len(asked)
        if setup != "float32":
            return
        asked, right = asked[ONE_OF_EACH_SKILL], right[ONE_OF_EACH_SKILL]
        again = asyncio.run(ask_server(server.url, asked))
    assert _differences(again, asked, right) == 0
    assert all(
        answer.num_cached_tokens
        for answer, exam in zip(again, asked, strict=True)
        if exam.lesson.turns[0].pictures
    )


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_pictures(name: str, server: Server) -> None:
    question, answer = SAMPLES[name]
    data = (EMBEDDED / "samples" / f"{name}.png").read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        completion = client.chat.completions.create(
            model="embedded-shapes", messages=[{"role": "user", "content": content}]
        )  # type: ignore[typeddict-item]
    assert completion.choices[0].message.content == answer


def _differences(answers: Sequence[Answer], asked: Sequence[Exam], right: Sequence[bool]) -> int:
    return sum(
        (answer.text == exam.lesson.turns[-1].answer) != value
        for answer, exam, value in zip(answers, asked, right, strict=True)
    )
