"""A form of thoughts is added by one file, which a family names: a toy reads what the real server sends."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.parsers.forms import ChatForms
from pipeline.parsers.registry import check_names
from pipeline.wire.sampling import FinishReason
from tests.workers.api import toys
from tests.workers.api.serving import CHAT, STREAMED_CHAT, FakeClient, Pieces, endpoint, piece, post, serving

TEXT = "Well.<think>2 < 3, so <b>yes</think>Yes, 2 < 3"
CONTENT, THOUGHT = "Well.Yes, 2 < 3", "2 < 3, so <b>yes"


def saying(pieces: list[str]) -> FakeClient:
    async def answer() -> Pieces:
        for text in pieces:
            yield piece(text)
        yield piece("", FinishReason.STOP)

    return FakeClient(answer)


async def whole(client: FakeClient, parser: str) -> dict[str, Any]:
    """The message."""
    with toys.installed():
        async with serving(endpoint(client, forms=ChatForms(None, reasoning_parser=parser))) as site:
            answer = await site.ask(post(CHAT))
    assert answer.status == 200
    message: dict[str, Any] = json.loads(answer.body)["choices"][0]["message"]
    return message


async def streamed(client: FakeClient, parser: str) -> dict[str, str]:
    """The deltas, put together."""
    with toys.installed():
        server = endpoint(client, forms=ChatForms(None, reasoning_parser=parser))
        async with serving(server) as site, site.connect() as wire:
            await wire.send(post(STREAMED_CHAT))
            said = await wire.reader.readuntil(b"data: [DONE]\n\n")
    made: dict[str, str] = {}
    for line in said.decode().splitlines():
        if line.startswith("data: {"):
            for name, text in json.loads(line[6:])["choices"][0]["delta"].items():
                made[name] = made.get(name, "") + text
    return made


@pytest.mark.parametrize("cut", range(len(TEXT)))
async def test_thoughts_are_told_apart_wherever_the_text_is_cut(cut: int) -> None:
    pieces = [TEXT[:cut], TEXT[cut:]]
    message = await whole(saying(pieces), "toy")
    assert (message["content"], message["reasoning_content"]) == (CONTENT, THOUGHT)
    made = await streamed(saying(pieces), "toy")
    assert made.pop("reasoning") == THOUGHT
    assert made == {"role": "assistant", "content": CONTENT, "reasoning_content": THOUGHT}


@pytest.mark.parametrize("text", [TEXT, "a <thin", "<think>on and o", "<think>", "</think>"])
async def test_no_text_is_lost_in_single_characters(text: str) -> None:
    ours = await whole(saying([text]), "toy")
    made = await streamed(saying(list(text)), "toy")
    assert made["content"] == (ours["content"] or "")
    assert made.get("reasoning_content") == ours.get("reasoning_content")
    told = made["content"] + made.get("reasoning_content", "")
    kept = {TEXT: CONTENT + THOUGHT, "<think>on and o": "on and o", "<think>": ""}.get(text, text)
    assert sorted(told) == sorted(kept)


async def test_a_family_without_a_form_of_its_own_has_its_text_passed_on() -> None:
    message = await whole(saying([TEXT]), "none")
    assert message == {"role": "assistant", "content": TEXT, "refusal": None}
    assert await streamed(saying(list(TEXT)), "none") == {
        "role": "assistant",
        "content": TEXT,
    }


@pytest.mark.parametrize(
    "names", [("hermes", "none"), ("auto", "qwen3"), ("qwen3_xml", "auto"), ("qwen3_coder", "auto")]
)
def test_forms_have_names(names: tuple[str, str]) -> None:
    check_names(*names)


@pytest.mark.parametrize("names", [("qwen3", "none"), ("auto", "hermes"), ("x", "auto")])
def test_an_unknown_name_is_refused_with_the_known_ones(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="known are auto, none, "):
        check_names(*names)
