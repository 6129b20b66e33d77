"""/v1/completions, over real sockets and a stand-in for the pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
import pytest

from pipeline.client.client import Piece
from pipeline.wire.clients import PromptLogprobs, TokenLogprobs
from pipeline.wire.errors import RequestError
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Prompt, Text, Tokens
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.workers.api.serving import FakeClient, endpoint, post, serving
from workers.api.endpoints.completions import to_prompts

JSON = "Content-Type: application/json"


def scored_prompt(text: str) -> PromptLogprobs:
    """Each letter is the seventh best, behind an x."""
    ids = [token for letter in text[1:] for token in (ord(letter), ord("x"))]
    values = np.array([-0.5, -0.25] * (len(text) - 1), dtype="<f4")
    return PromptLogprobs(pack_int32(ids), values.tobytes(), pack_int32([7] * (len(text) - 1)))


class EchoingClient(FakeClient):
    """Answers a prompt with its own text in capitals, a letter a token, and the choice's index."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts: list[Prompt] = []
        self.ids: list[str] = []

    def generate(  # type: ignore[override]
        self, prompt: Prompt, sampling: SamplingParams, media: Any = (), **options: Any
    ) -> AsyncGenerator[Piece, None]:
        self.prompts.append(prompt)
        self.sampling.append(sampling)
        self.ids.append(options["request_id"])
        return self._answer(prompt, sampling)

    async def _answer(self, prompt: Prompt, sampling: SamplingParams) -> AsyncGenerator[Piece, None]:
        match prompt:
            case Text(text):
                name = text
            case Tokens(token_ids):
                name = "".join(map(chr, unpack_int32(token_ids)))
            case _:
                raise AssertionError
        for index in range(sampling.n):
            text = f"{name.upper()}{index}"
            for number, letter in enumerate(text):
                is_last = number == len(text) - 1
                logprobs: tuple[TokenLogprobs, ...] = ()
                if sampling.logprobs is not None:
                    values = np.array([-1.0 + index / 10, -2.0, -np.inf], dtype="<f4")
                    ids = pack_int32([ord(letter), ord("x"), ord("y")])
                    count = 1 + sampling.logprobs
                    logprobs = (TokenLogprobs(ids[: 4 * count], values[:count].tobytes()),)
                finish = FinishReason.STOP if is_last else None
                made = Piece(letter, (ord(letter),), finish, len(name), number + 1, 1, logprobs, index)
                if not number and sampling.returns_prompt:
                    scores = (
                        scored_prompt(name) if sampling.prompt_logprobs is not None and not index else None
                    )
                    made = dataclasses.replace(
                        made, prompt_token_ids=tuple(map(ord, name)), prompt_logprobs=scores
                    )
                yield made

    def token_text(self, token_id: int) -> bytes:
        return chr(token_id).encode()


async def ask(client: FakeClient | None = None, status: int = 200, **fields: Any) -> Any:
    async with serving(endpoint(client or EchoingClient())) as site:
        answer = await site.ask(post(json.dumps(fields).encode(), JSON, path="/v1/completions"))
    assert answer.status == status, answer.body
    return json.loads(answer.body)


async def stream(**fields: Any) -> list[dict[str, Any]]:
    async with serving(endpoint(EchoingClient())) as site, site.connect() as wire:
        body = json.dumps({**fields, "stream": True}).encode()
        await wire.send(post(body, JSON, "Connection: close", path="/v1/completions"))
        data = (await wire.rest()).decode()
    lines = [line.removeprefix("data: ") for line in data.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def texts(answer: Any) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["AB0"]),
        (["ab", "cd"], ["AB0", "CD0"]),
        ([97, 98], ["AB0"]),
        ([[97], [98, 99]], ["A0", "BC0"]),
        (["ab", [99]], ["AB0", "C0"]),
    ],
)
async def test_every_form_of_a_prompt(prompt: Any, expected: list[str]) -> None:
    client = EchoingClient()
    answer = await ask(client, prompt=prompt)
    assert texts(answer) == expected
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert len(set(client.ids)) == len(expected), "each prompt is a request of its own"
    num_prompt = sum(len(text) - 1 for text in expected)
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == num_prompt + len(expected)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": len(expected)}


@pytest.mark.parametrize("prompt", [[], [[]], [True], [-1], [2**31], [1.5], [{"a": 1}], ["a", None], [["a"]]])
def test_what_is_no_prompt_is_refused_by_name(prompt: Any) -> None:
    if prompt == [[]]:
        assert to_prompts(prompt) == [Tokens(b"")]  # the pipeline refuses a prompt without tokens
        return
    with pytest.raises(RequestError) as caught:
        to_prompts(prompt)
    assert caught.value.info.field.startswith("prompt")


def test_the_number_of_prompts_is_bounded() -> None:
    assert len(to_prompts(["a"] * 1024)) == 1024
    with pytest.raises(RequestError, match="1 to 1024 prompts"):
        to_prompts(["a"] * 1025)


async def test_more_prompts_than_run_at_once_are_all_answered() -> None:
    prompts = [f"p{number}." for number in range(100)]
    answer = await ask(prompt=prompts, n=2)
    assert texts(answer) == [f"{prompt.upper()}{index}" for prompt in prompts for index in range(2)]


async def test_sixteen_tokens_unless_more_are_asked_for() -> None:
    client = EchoingClient()
    for fields in ({}, {"max_tokens": None}, {"max_tokens": 40}, {"max_tokens": -1}):
        await ask(client, prompt="a", **fields)
    assert [sampling.max_tokens for sampling in client.sampling] == [16, 16, 40, None]


async def test_the_best_of_several() -> None:
    client = EchoingClient()
    answer = await ask(client, prompt=["a", "b"], n=2, best_of=4)
    assert texts(answer) == ["A3", "A2", "B3", "B2"], "the likeliest first"
    assert answer["usage"]["completion_tokens"] == 16, "those that are not shown were computed too"
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    for fields in (
        {"n": 3, "best_of": 2},
        {"best_of": 17},
        {"n": 1, "best_of": 2, "stream": True},
        {"best_of": 0},
    ):
        assert (await ask(status=400, prompt="a", **fields))["error"]["param"] == "best_of"
    assert (await ask(status=400, prompt="a", n=0))["error"]["param"] == "n"


async def test_an_echo_comes_before_the_continuation() -> None:
    assert texts(await ask(prompt=["ab", [99]], echo=True)) == ["abAB0", "cC0"]
    chunks = await stream(prompt=["ab", [99]], echo=True)
    shown = ["", ""]
    for chunk in chunks:
        shown[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert shown == ["abAB0", "cC0"]


async def test_an_echoed_prompt_with_its_logprobs() -> None:
    """What lm-eval asks for."""
    client = EchoingClient()
    answer = await ask(client, prompt=["abc", [100, 101]], echo=True, logprobs=1, max_tokens=0)
    assert texts(answer) == ["abc", "de"]
    assert {sampling.max_tokens for sampling in client.sampling} == {1}
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"x": -0.25, "b": -0.5}, {"x": -0.25, "c": -0.5}],
        "text_offset": [0, 1, 2],
    }
    answer = await ask(prompt="ab", echo=True, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == list("abAB0")
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    chunks = await stream(prompt="ab", echo=True, logprobs=1)
    told = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert told == [[0, 1], [2], [3], [4]]


async def test_logprobs_of_a_prompt() -> None:
    answer = await ask(prompt="ab", prompt_logprobs=1)
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -0.5, "rank": 7, "decoded_token": "b"},
            "120": {"logprob": -0.25, "rank": 1, "decoded_token": "x"},
        },
    ]
    assert answer["choices"][0]["logprobs"] is None
    refused = await ask(status=400, prompt="ab", prompt_logprobs=1, stream=True)
    assert refused["error"]["param"] == "prompt_logprobs"
    refused = await ask(status=400, prompt="ab", prompt_logprobs=21)
    assert refused["error"]["param"] == "prompt_logprobs"


async def test_token_ids_come_back() -> None:
    (choice,) = (await ask(prompt="ab", return_token_ids=True))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([97, 98], [65, 66, 48])
    chunks = [chunk["choices"][0] for chunk in await stream(prompt="ab", return_token_ids=True)]
    assert [chunk["token_ids"] for chunk in chunks] == [[65], [66], [48]]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[97, 98], None, None]
    (choice,) = (await ask(prompt="ab"))["choices"]
    assert "token_ids" not in choice


async def test_logprobs_side_by_side() -> None:
    answer = await ask(prompt="ab", logprobs=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["A", "B", "0"],
        "token_logprobs": [-1.0] * 3,
        "top_logprobs": [{letter: -1.0, "x": -2.0, "y": -9999.0} for letter in "AB0"],
        "text_offset": [0, 1, 2],
    }
    chosen = (await ask(prompt="ab", logprobs=0))["choices"][0]["logprobs"]["top_logprobs"]
    assert chosen == [{letter: -1.0} for letter in "AB0"], "as in vLLM"
    assert (await ask(status=400, prompt="a", logprobs=21))["error"]["param"] == "logprobs"
    offsets = [
        offset
        for chunk in await stream(prompt="ab", logprobs=1)
        for offset in chunk["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == [0, 1, 2]


async def test_a_stream_of_several_choices() -> None:
    chunks = await stream(prompt=["a", "b"], n=2, stream_options={"include_usage": True})
    shown = ["", "", "", ""]
    finished: list[int] = []
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        assert choice["index"] not in finished
        shown[choice["index"]] += choice["text"]
        finished += [choice["index"]] if choice["finish_reason"] == "stop" else []
        assert "usage" not in chunk
    assert shown == ["A0", "A1", "B0", "B1"]
    assert sorted(finished) == [0, 1, 2, 3]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


async def test_usage_in_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"] for chunk in await stream(prompt="ab", stream_options=options)
    ]
    assert counts == [1, 2, 3, 3]
    alone = await stream(prompt="ab", stream_options={"continuous_usage_stats": True})
    assert not any("usage" in chunk for chunk in alone), "as in vLLM"


async def test_unknown_fields_are_ignored_and_told() -> None:
    body = json.dumps({"prompt": "a", "top_secret": 1, 'é\\"': 2, "empty": [], "typical_p": 1}).encode()
    async with serving(endpoint(EchoingClient())) as site:
        answer = await site.ask(post(body, JSON, path="/v1/completions"))
        assert answer.status == 200
        assert answer.headers["warning"].startswith("299 - \"ignored fields: 'top_secret', '")
        assert answer.headers["warning"].isascii()
        assert answer.headers["warning"].count('"') == 2, "the text's own would end it"
        plain = await site.ask(post(b'{"prompt": "a"}', JSON, path="/v1/completions"))
        assert "warning" not in plain.headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "x"),
        ("use_beam_search", True),
        ("mirostat", 2),
        ("logprob_token_ids", [3]),
        ("truncation_side", "right"),
    ],
)
async def test_what_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    assert (await ask(status=400, prompt="a", **{name: value}))["error"]["param"] == name


async def test_what_is_left_of_a_prompt_is_echoed() -> None:
    client = EchoingClient()
    body = {"prompt": "abcd", "truncate_prompt_tokens": 2, "echo": True, "max_tokens": 3}
    async with serving(endpoint(client)) as site:  # type: ignore[arg-type]
        answer = json.loads((await site.ask(post(json.dumps(body).encode(), path="/v1/completions"))).body)
    assert client.sampling[0].truncate_prompt_tokens == 2
    assert client.sampling[0].return_token_ids
    assert "prompt_token_ids" not in answer["choices"][0]
