"""Anthropic's API, over real sockets and a stand-in for the pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from pipeline.client.client import Piece
from pipeline.families.chat_template import ChatTemplate
from pipeline.parsers.forms import ChatForms
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Chat, ChatMessage, ImagePart, TextPart, ToolCall
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.pictures import data_url, scene
from tests.workers.api.serving import FakeClient, endpoint, piece, post, serving
from workers.api.anthropic_request import MessagesRequest, to_chat_request
from workers.api.chat_request import check_chat, to_messages, to_template_options
from workers.api.json_bodies import decode_json

WEATHER = {
    "name": "weather",
    "description": "of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
FORMS = ChatForms(None, "hermes", "qwen3")


def messages(*given: Any, **fields: Any) -> list[ChatMessage]:
    body = {"max_tokens": 9, "messages": list(given), **fields}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), ChatForms(None))
    check_chat(request)
    return to_messages(request)


def refused(*given: Any, **fields: Any) -> str:
    with pytest.raises(RequestError) as caught:
        messages(*given, **fields)
    return caught.value.info.field


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": None}}, False),
    ],
)
def test_no_model_thinks_unasked_where_its_template_has_the_choice(
    thinking: dict[str, Any], thinks: bool
) -> None:
    forms = ChatForms(ChatTemplate("{% if enable_thinking %}<think>{% endif %}</think>"))
    body = {"max_tokens": 9, "messages": [user(text("a"))], **thinking}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), forms)
    assert request.chat_template_kwargs == {"enable_thinking": thinks}


def test_options_go_to_the_template() -> None:
    forms = ChatForms(ChatTemplate("{% if enable_thinking %}<think>{% endif %}</think>"))
    options = {"preserve_thinking": True, "add_vision_id": None}
    body = {"max_tokens": 9, "messages": [user(text("a"))], "chat_template_kwargs": options}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), forms)
    assert to_template_options(request, forms) == {"enable_thinking": False, "preserve_thinking": True}
    body["chat_template_kwargs"] = {"chat_template": "{{ messages }}"}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), forms)
    with pytest.raises(RequestError) as caught:
        to_template_options(request, forms)
    assert caught.value.info.field == "chat_template_kwargs.chat_template"


def test_a_system_prompt_pictures_and_texts() -> None:
    url = data_url(scene(1))
    source = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    found = messages(
        user(text("See:"), {"type": "image", "source": source}),
        {"role": "assistant", "content": "I see."},
        user({"type": "image", "source": {"type": "url", "url": "http://x/y"}}, text("And?")),
        system=[text("Be brief.", cache_control={"type": "ephemeral"})],
    )
    assert found == [
        ChatMessage("system", (TextPart("Be brief."),)),
        ChatMessage("user", (TextPart("See:"), ImagePart(url=url))),
        ChatMessage("assistant", "I see."),
        ChatMessage("user", (ImagePart(url="http://x/y"), TextPart("And?"))),
    ]


def test_calls_results_and_thoughts_of_earlier_turns() -> None:
    picture = {"type": "image", "source": {"type": "url", "url": "http://x/y"}}
    found = messages(
        user(text("Weather?")),
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "abc"},
                {"type": "redacted_thinking", "data": "xyz"},
                text("I ask."),
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "t2", "name": "map", "input": {}},
            ],
        },
        user(
            {"type": "tool_result", "tool_use_id": "t1", "content": "rain"},
            {"type": "tool_result", "tool_use_id": "t2", "content": [picture], "is_error": False},
            text("So?"),
        ),
    )
    assert found[1:] == [
        ChatMessage(
            "assistant", "I ask.", reasoning="Hm.",
            tool_calls=(ToolCall("t1", "weather", '{"city": "Köln"}'), ToolCall("t2", "map", "{}")),
        ),
        ChatMessage("tool", "rain", tool_call_id="t1"),
        ChatMessage("tool", (ImagePart(url="http://x/y"),), tool_call_id="t2"),
        ChatMessage("user", (TextPart("So?"),)),
    ]  # fmt: skip


def test_the_last_message_of_an_assistant_is_continued() -> None:
    body = {"max_tokens": 9, "messages": [user(text("a")), {"role": "assistant", "content": "The answer"}]}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), ChatForms(None))
    assert (request.continue_final_message, request.add_generation_prompt) == (True, False)


@pytest.mark.parametrize(
    ("choice", "expected", "is_parallel"),
    [
        (None, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, None, False),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}, True),
    ],
)
def test_tools_and_their_choice(choice: Any, expected: Any, is_parallel: bool) -> None:
    body = {"max_tokens": 9, "messages": [user(text("a"))], "tools": [WEATHER], "tool_choice": choice}
    request = to_chat_request(decode_json(json.dumps(body).encode(), MessagesRequest), ChatForms(None))
    assert (request.tool_choice, request.parallel_tool_calls) == (expected, is_parallel)
    (tool,) = request.tools or ()
    assert tool["function"]["name"] == "weather"
    assert tool["function"]["parameters"] == WEATHER["input_schema"]


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"type": "video"}, "type"),
        ({"type": "text"}, "text"),
        ({"type": "text", "text": "a", "colour": "red"}, "colour"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source"),
        ({"type": "document", "source": {"type": "base64", "data": ""}}, "source"),
        ({"type": "tool_result"}, "tool_use_id"),
        ({"type": "tool_use", "id": "a", "name": "b", "input": 3}, "input"),
    ],
)
def test_blocks_that_are_not_served_are_refused_by_name(block: Any, field: str) -> None:
    assert refused(user(block)) == f"messages[0].content[0].{field}"


def test_fields_that_are_not_served_are_refused_by_name() -> None:
    chat = user(text("a"))
    assert refused({"role": "robot", "content": "a"}) == "messages[0].role"
    assert refused(chat, tools=[{"type": "web_search_20250305", "name": "x"}]) == "tools[0].type"
    assert refused(chat, tools=[WEATHER | {"cache_control": {}, "input_examples": [1]}]) == (
        "tools[0].input_examples"
    )
    assert refused(chat, tool_choice={"type": "many"}) == "tool_choice"
    assert refused(chat, thinking={"type": "maybe"}) == "thinking.type"
    assert refused(chat, thinking={"type": "enabled", "budget_tokens": "x"}) == "thinking.budget_tokens"
    assert refused(chat, output_config={"format": {"type": "xml"}}) == "output_config.format"
    assert refused(chat, output_config={"colour": "red"}) == "output_config.colour"


# Answers.


class Writer(FakeClient):
    """Writes these pieces, whatever it is asked, and keeps what it was asked."""

    def __init__(
        self, *pieces: str, finish: FinishReason = FinishReason.STOP, stop: str | None = None
    ) -> None:
        super().__init__()
        self.pieces, self.finish, self.stop = pieces, finish, stop
        self.chats: list[Chat] = []

    def generate(  # type: ignore[override]
        self, prompt: Chat, sampling: SamplingParams, media: Any = (), **options: Any
    ) -> AsyncGenerator[Piece, None]:
        self.chats.append(prompt)
        self.sampling.append(sampling)
        return self._write(sampling)

    async def _write(self, sampling: SamplingParams) -> AsyncGenerator[Piece, None]:
        if sampling.max_tokens == 0:
            yield dataclasses.replace(piece("", FinishReason.LENGTH), prompt_token_ids=(1, 2, 3))
            return
        for number, words in enumerate(self.pieces):
            is_last = number == len(self.pieces) - 1
            made = Piece(words, (1,), self.finish if is_last else None, 10, number + 1, 4)
            yield dataclasses.replace(made, stop_reason=self.stop if is_last else None)


HELLO = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}]}


async def ask(client: FakeClient, status: int = 200, path: str = "/v1/messages", **fields: Any) -> Any:
    async with serving(endpoint(client, forms=FORMS)) as site:
        answer = await site.ask(post(json.dumps({**HELLO, **fields}).encode(), path=path))
    assert answer.status == status, answer.body
    return json.loads(answer.body)


async def stream(client: FakeClient, **fields: Any) -> list[Any]:
    async with serving(endpoint(client, forms=FORMS)) as site, site.connect() as wire:
        body = json.dumps({**HELLO, **fields, "stream": True}).encode()
        await wire.send(post(body, "Connection: close", path="/v1/messages"))
        lines = (await wire.rest()).decode().splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names == [one["type"] for one in events]
    return events


async def test_a_whole_answer() -> None:
    client = Writer("Hel", "lo")
    answer = await ask(client, temperature=0.5, top_k=7, stop_sequences=["x"])
    assert answer["content"] == [{"type": "text", "text": "Hello"}]
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "m")
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"] == {
        "input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 2,
    }  # fmt: skip
    (sampling,) = client.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.5, 7, 9)
    assert sampling.stop == ("x",)


async def test_a_budget_of_thoughts() -> None:
    client = Writer("a")
    await ask(client, thinking={"type": "enabled", "budget_tokens": 2048})
    await ask(client, thinking={"type": "disabled"})
    assert [sampling.thinking_budget for sampling in client.sampling] == [2048, None]


async def test_how_an_answer_ended() -> None:
    assert (await ask(Writer("a", finish=FinishReason.LENGTH)))["stop_reason"] == "max_tokens"
    stopped = await ask(Writer("a", stop="END"))
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "END")


async def test_a_stream() -> None:
    events = await stream(Writer("Hel", "lo"))
    assert [one["type"] for one in events] == [
        "message_start", "ping", "content_block_start", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == 6
    assert events[2] == {
        "type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}
    }  # fmt: skip
    assert "".join(one["delta"]["text"] for one in events[3:5]) == "Hello"
    assert events[6]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[6]["usage"]["output_tokens"] == 2


THINKS_AND_CALLS = (
    "<think>Hm", ", so.</think>\n\nI ask.\n", '<tool_call>\n{"name": "weather", ',
    '"arguments": {"city": "Köln"}}\n</tool_call>',
)  # fmt: skip


async def test_thoughts_and_calls() -> None:
    answer = await ask(Writer(*THINKS_AND_CALLS), tools=[WEATHER])
    thought, words, call = answer["content"]
    assert (thought["type"], thought["thinking"]) == ("thinking", "Hm, so.")
    assert (words["type"], words["text"].strip()) == ("text", "I ask.")
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Köln"})
    assert call["id"].startswith("toolu_")
    assert answer["stop_reason"] == "tool_use"


async def test_thoughts_and_calls_in_a_stream() -> None:
    events = await stream(Writer(*THINKS_AND_CALLS), tools=[WEATHER])
    kinds = {one["index"]: one["content_block"]["type"] for one in events if "content_block" in one}
    assert kinds == {0: "thinking", 1: "text", 2: "tool_use"}
    grown = dict.fromkeys(kinds, "")
    for one in events:
        if one["type"] == "content_block_delta":
            kind = one["delta"]["type"]
            name = {"input_json_delta": "partial_json"}.get(kind, kind.removesuffix("_delta"))
            grown[one["index"]] += one["delta"][name]
    assert (grown[0], grown[1].strip(), json.loads(grown[2])) == ("Hm, so.", "I ask.", {"city": "Köln"})
    order = [(one["type"], one["index"]) for one in events if "index" in one]
    assert order.index(("content_block_stop", 0)) < order.index(("content_block_start", 1))
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


async def test_tokens_are_counted() -> None:
    client = Writer()
    told = await ask(client, path="/v1/messages/count_tokens", max_tokens=None, tools=[WEATHER])
    assert told == {"input_tokens": 3}
    assert b"weather" in client.chats[0].tools


async def test_errors_are_anthropics() -> None:
    told = await ask(Writer(), status=400, max_tokens=None)
    assert told["type"] == "error"
    assert told["error"]["type"] == "invalid_request_error"
    assert "max_tokens" in told["error"]["message"]
    told = await ask(Writer(), status=404, model="another")
    assert told["error"]["type"] == "not_found_error"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": -1}}, "thinking.budget_tokens"),
        ({"output_config": {"effort": "much"}}, "output_config.effort"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format"),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers"),
    ],
)
async def test_errors_name_the_field_as_the_client_wrote_it(fields: Any, field: str) -> None:
    answer = await ask(Writer("a"), 400, **fields)
    assert answer["error"]["message"].startswith(f"{field}: ")


def test_blocks_are_counted_before_anything_walks_over_them() -> None:
    """What is wrong with the first is not looked at."""
    text, result = {"type": "text", "text": "a"}, {"type": "tool_result", "tool_use_id": "1"}
    robot = {"type": "robot"}
    assert refused(user(robot, *[text] * 20_000)) == "messages"
    assert refused(user(robot), *[user(*[text] * 100)] * 200) == "messages"
    assert refused(user(robot, *[{**result, "content": [text] * 1000}] * 17)) == "messages"
    assert refused(user(text), system=[robot, *[text] * 20_000]) == "system"
    assert (
        refused({"role": "robot", "content": "a"}, *[{"role": "user", "content": "a"}] * 20_000) == "messages"
    )
