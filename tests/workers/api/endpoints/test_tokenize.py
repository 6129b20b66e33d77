from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pipeline.client.client import Piece
from pipeline.wire.packing import unpack_int32
from pipeline.wire.prompts import Chat, Prompt, Text, Tokens
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.workers.api.serving import FakeClient, endpoint, get, piece, post, serving


class LetterClient(FakeClient):
    """A token is a letter. Nothing is ever computed."""

    def generate(  # type: ignore[override]
        self, prompt: Prompt, sampling: SamplingParams, media: Any = (), **options: Any
    ) -> AsyncGenerator[Piece, None]:
        assert sampling.max_tokens == 0
        return self._answer(prompt)

    async def _answer(self, prompt: Prompt) -> AsyncGenerator[Piece, None]:
        match prompt:
            case Text(text):
                ids = [ord(letter) for letter in text]
            case Tokens(token_ids):
                ids = unpack_int32(token_ids).tolist()
            case Chat(messages):
                ids = [ord(letter) for message in messages for letter in str(message.content)]
            case _:
                raise AssertionError
        last = piece("", FinishReason.LENGTH)
        yield dataclasses.replace(last, token_ids=(), prompt_token_ids=tuple(ids))

    def token_text(self, token_id: int) -> bytes:
        return chr(token_id).encode()


async def ask(path: str, status: int = 200, **fields: Any) -> Any:
    async with serving(endpoint(LetterClient())) as site:
        answer = await site.ask(post(json.dumps(fields).encode(), path=path))
    assert answer.status == status, answer.body
    return json.loads(answer.body)


async def test_the_tokens_of_a_text() -> None:
    told = await ask("/tokenize", prompt="hé", return_token_strs=True)
    assert told == {"count": 2, "max_model_len": 8192, "tokens": [104, 233], "token_strs": ["h", "é"]}
    assert (await ask("/tokenize", prompt="h"))["token_strs"] is None


async def test_the_form_of_llama_cpp() -> None:
    told = await ask("/tokenize", content="hi", with_pieces=True, add_special=False)
    assert told["tokens"] == [{"id": 104, "piece": "h"}, {"id": 105, "piece": "i"}]
    assert (await ask("/detokenize", tokens=[104, 105]))["content"] == "hi"


CHAT = [{"role": "user", "content": "hi"}]


async def test_the_tokens_of_a_chat() -> None:
    assert (await ask("/tokenize", messages=CHAT))["tokens"] == [104, 105]
    told = await ask("/v1/chat/completions/render", messages=CHAT)
    assert (told["prompt_token_ids"], told["prompt"], told["count"]) == ([104, 105], "hi", 2)
    assert told["token_ids"] == told["prompt_token_ids"]
    assert (await ask("/tokenize", status=400, messages=CHAT, prompt="a"))["error"]["param"] == "prompt"


async def test_the_text_of_tokens() -> None:
    assert (await ask("/detokenize", tokens=[104, 105]))["prompt"] == "hi"


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"content": "a", "parse_special": False}, "parse_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_bad_requests_are_refused_by_field(path: str, fields: dict[str, Any], field: str) -> None:
    assert (await ask(path, status=400, **fields))["error"]["param"] == field


async def test_another_model_is_not_served() -> None:
    for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        told = await ask(path, status=404, model="another", **fields)
        assert told["error"]["code"] == "model_not_found"


async def test_the_card_of_a_model() -> None:
    async with serving(endpoint(LetterClient())) as site:
        listed = json.loads((await site.ask(get("/v1/models"))).body)
        (card,) = listed["data"]
        assert (card["id"], card["root"], card["max_model_len"]) == ("m", "m", 8192)
        assert json.loads((await site.ask(get("/v1/models/m"))).body) == card
        answer = await site.ask(get("/v1/models/some/other"))
        assert answer.status == 404
        assert json.loads(answer.body)["error"]["code"] == "model_not_found"
