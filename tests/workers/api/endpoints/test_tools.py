"""Tools, thoughts and structured answers in a chat, as OpenAI's own client sends and reads them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from pipeline.families.chat_template import ChatTemplate
from pipeline.parsers.forms import ChatForms
from pipeline.wire.prompts import ChatMessage, ToolCall
from pipeline.wire.sampling import FinishReason, Grammar, GrammarKind
from tests.pipeline.parsers.reading import TOKENIZER
from tests.tool_chats import BARE, TOOLS, WEATHER
from tests.workers.api.serving import FakeClient, Pieces, endpoint, piece, serving
from tools.random_checkpoint.tokenizer import chat_template

OWN = Path(__file__).parents[3] / "templates"
HELLO = {"role": "user", "content": "Hello"}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln", "days": 2}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=town>\nKöln\n</parameter>\n</function>\n</tool_call>"


def forms(name: str = "qwen3_vl", **names: str) -> ChatForms:
    own = OWN / f"{name}.jinja"
    return ChatForms(ChatTemplate(own.read_text() if own.exists() else chat_template(name)), **names)


def writing(text: str, finish: FinishReason = FinishReason.STOP) -> FakeClient:
    """Writes a text token by token."""

    async def answer() -> Pieces:
        offsets = TOKENIZER.encode(text, add_special_tokens=False).offsets
        starts = [start for start, _ in offsets]
        for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
            if start < stop:
                yield piece(text[start:stop])
        yield piece("", finish)

    return FakeClient(answer)


@asynccontextmanager
async def asking(fake: FakeClient, made: ChatForms | None = None) -> AsyncIterator[openai.AsyncOpenAI]:
    async with serving(endpoint(fake, forms=made or forms())) as site:
        base = f"http://{site.host}:{site.port}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
            yield client


async def create(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(**{"model": "m", "messages": [HELLO], **fields})


async def streamed(client: openai.AsyncOpenAI, **fields: Any) -> dict[str, Any]:
    """The deltas put together, as a client does it."""
    made: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    async for chunk in await create(client, stream=True, **fields):
        (choice,) = chunk.choices
        delta = choice.delta
        made["content"] += delta.content or ""
        made["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.index == len(made["calls"]):
                assert call.type == "function"
                assert call.id.startswith("call_")
                made["calls"].append([call.function.name, ""])
            else:
                assert call.id is None
                assert call.function.name is None
            made["calls"][call.index][1] += call.function.arguments
        made["finish_reason"] = choice.finish_reason or made["finish_reason"]
    return made


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, None, [("weather", '{"town": "Köln", "days": 2}')]),
        (f"I look.\n{CALL}\n{NOW}", "I look.", [("weather", '{"town": "Köln", "days": 2}'), ("now", "{}")]),
        ("No need.", "No need.", []),
    ],
)
async def test_calls_are_read_whole_and_in_a_stream(
    text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    async with asking(writing(text)) as client:
        choice = (await create(client, tools=TOOLS)).choices[0]
        made = await streamed(client, tools=TOOLS)
    told = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in told] == calls
    assert len({call.id for call in told}) == len(calls)
    assert choice.message.content == content
    finish = "tool_calls" if calls else "stop"
    assert choice.finish_reason == made["finish_reason"] == finish
    assert (made["content"], made["calls"]) == (content or "", [list(call) for call in calls])


async def test_the_usage_so_far_begins_without_an_output() -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    async with asking(writing("Hello")) as client:
        chunks = [chunk async for chunk in await create(client, stream=True, stream_options=options)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].usage.completion_tokens == 0
    assert chunks[1].usage.completion_tokens > 0


async def test_each_choice_has_its_own_calls() -> None:
    async with asking(writing(CALL)) as client:
        answer = await create(client, tools=TOOLS, n=2)
        assert [len(choice.message.tool_calls) for choice in answer.choices] == [1, 1]
        finished = set()
        async for chunk in await create(client, tools=TOOLS, n=2, stream=True):
            finished |= {(one.index, one.finish_reason) for one in chunk.choices if one.finish_reason}
    assert finished == {(0, "tool_calls"), (1, "tool_calls")}


async def test_an_answer_that_is_cut_in_a_call_says_so() -> None:
    async with asking(writing(CALL[:60], FinishReason.LENGTH)) as client:
        choice = (await create(client, tools=TOOLS)).choices[0]
    assert choice.finish_reason == "length"
    assert '{"town": "Köln", "days": 2}'.startswith(choice.message.tool_calls[0].function.arguments)


async def test_a_second_turn_takes_the_clients_own_message() -> None:
    fake = writing(f"<think>\nHm.\n</think>\n\nI look.\n{CALL}")
    async with asking(fake, forms("qwen3")) as client:
        message = (await create(client, tools=TOOLS)).choices[0].message
        (call,) = message.tool_calls
        result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
        for given in (message, {**message.model_dump(), "provider_specific_fields": {"x": 1}}):
            await create(client, tools=TOOLS, messages=[HELLO, given, result])
            _, assistant, tool = fake.prompts[-1].messages
            assert assistant == ChatMessage(
                "assistant",
                "I look.",
                (ToolCall(call.id, "weather", '{"town": "Köln", "days": 2}'),),
                reasoning="Hm.",
            )
            assert (tool.role, tool.tool_call_id) == ("tool", call.id)
    assert json.loads(fake.prompts[0].tools) == TOOLS


async def test_the_clients_stream_helper_and_its_models() -> None:
    class Weather(pydantic.BaseModel):
        town: str
        days: int

    tool = openai.pydantic_function_tool(Weather, name="weather")
    fake = writing(CALL)
    async with asking(fake) as client:
        fields: dict[str, Any] = {"model": "m", "messages": [HELLO], "tools": [tool]}
        parsed = await client.chat.completions.parse(**fields)
        async with client.chat.completions.stream(**fields) as stream:
            kinds = {event.type async for event in stream}
            final = await stream.get_final_completion()
    for answer in (parsed, final):
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.function.parsed_arguments == Weather(town="Köln", days=2)
    assert "tool_calls.function.arguments.delta" in kinds
    assert fake.sampling[0].grammar.kind is GrammarKind.STRUCTURAL_TAG, "the helper's functions are strict"


async def test_structured_answers_of_the_clients_helper() -> None:
    class Weather(pydantic.BaseModel):
        town: str

    fake = writing('{"town": "Köln"}')
    async with asking(fake) as client:
        answer = await client.chat.completions.parse(
            model="m", messages=[{"role": "user", "content": "x"}], response_format=Weather
        )
    assert answer.choices[0].message.parsed == Weather(town="Köln")
    (sampling,) = fake.sampling
    assert sampling.grammar.kind is GrammarKind.JSON_SCHEMA
    assert json.loads(sampling.grammar.source)["required"] == ["town"]


THINKING = "<think>\nHm.\n</think>\n\nYes."


async def test_thoughts_come_by_both_names_or_not_at_all() -> None:
    async with asking(writing(THINKING), forms("qwen3")) as client:
        message = (await create(client)).choices[0].message
        assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Hm.", "Hm.")
        made = await streamed(client)
        assert (made["content"], made["reasoning"]) == ("Yes.", "Hm.")
        message = (await create(client, extra_body={"include_reasoning": False})).choices[0].message
        assert message.content == "Yes."
        assert not hasattr(message, "reasoning_content")
        made = await streamed(client, extra_body={"include_reasoning": False})
        assert (made["content"], made["reasoning"]) == ("Yes.", "")


async def test_the_prompt_has_opened_the_thought() -> None:
    async with asking(writing(f"Hm.\n</think>\n\n{XML}"), forms("qwen3_5")) as client:
        message = (await create(client, tools=TOOLS)).choices[0].message
        assert (message.content, message.reasoning) == (None, "Hm.")
        assert message.tool_calls[0].function.arguments == '{"town": "Köln"}'
    async with asking(writing("Yes."), forms("qwen3_5")) as client:
        options = {"chat_template_kwargs": {"enable_thinking": False}}
        message = (await create(client, extra_body=options)).choices[0].message
        assert message.content == "Yes."
        assert (await create(client)).choices[0].message.content is None, "the model thought to the end"


@pytest.mark.parametrize(
    ("name", "body", "options"),
    [
        ("qwen3", {"reasoning_effort": "none"}, {"enable_thinking": False}),
        ("qwen3", {"reasoning_effort": "minimal"}, {"enable_thinking": False}),
        ("qwen3", {"reasoning_effort": {"effort": "high"}}, {"enable_thinking": True}),
        ("qwen3", {"reasoning": {"effort": "none"}}, {"enable_thinking": False}),
        ("qwen3_vl", {"reasoning_effort": "none"}, {}),
        ("qwen3_vl", {"reasoning_effort": None}, {}),
        (
            "qwen3",
            {"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True},
        ),
        ("qwen3_vl", {"chat_template_kwargs": {"add_vision_id": True}}, {"add_vision_id": True}),
    ],
)
async def test_options_of_the_template(name: str, body: dict[str, Any], options: dict[str, Any]) -> None:
    fake = writing("x")
    async with asking(fake, forms(name)) as client:
        await create(client, extra_body=body)
    assert dict(fake.prompts[0].template_options) == options


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget"])
async def test_a_budget_of_thoughts(field: str) -> None:
    fake = writing("x")
    async with asking(fake) as client:
        await create(client, extra_body={field: 7})
        assert fake.sampling[0].thinking_budget == 7
        with pytest.raises(openai.BadRequestError) as caught:
            await create(client, extra_body={field: -1})
    assert caught.value.param == field


async def test_how_the_prompt_ends() -> None:
    fake = writing("x")
    last = {"role": "assistant", "content": "One, two,"}
    body = {"add_generation_prompt": False, "continue_final_message": True}
    async with asking(fake) as client:
        await create(client, messages=[HELLO, last], extra_body=body)
    (chat,) = fake.prompts
    assert (chat.add_generation_prompt, chat.continue_final_message) == (False, True)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


STRICT = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}


@pytest.mark.parametrize(
    ("fields", "shown", "kind", "forced"),
    [
        ({"tools": TOOLS}, ["weather", "look", "now"], None, []),
        ({"tools": TOOLS, "tool_choice": "auto"}, ["weather", "look", "now"], None, []),
        ({"tools": TOOLS, "tool_choice": "none"}, [], None, []),
        ({"tools": [WEATHER, BARE], "tool_choice": "required"}, ["weather", "now"], "tags_with_separator",
         ["weather", "now"]),
        ({"tools": [WEATHER, BARE], "tool_choice": "required", "parallel_tool_calls": False},
         ["weather", "now"], "or", ["weather", "now"]),
        ({"tools": TOOLS, "tool_choice": named("now")}, ["now"], "tag", ["now"]),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "now")}, ["now"], None, []),
        ({"tools": TOOLS, "tool_choice": allowed("required", "now", "look")}, ["now", "look"],
         "tags_with_separator", ["now", "look"]),
        ({"tools": [STRICT, BARE]}, ["weather", "now"], "triggered_tags", ["weather", "now"]),
        ({"tools": [BARE], "parallel_tool_calls": False}, ["now"], "triggered_tags", ["now"]),
        ({"tools": [], "tool_choice": "auto"}, [], None, []),
    ],
)  # fmt: skip
async def test_what_the_model_must_do(
    fields: dict[str, Any], shown: list[str], kind: str | None, forced: list[str]
) -> None:
    fake = writing("x")
    async with asking(fake) as client:
        await create(client, **fields)
    data = fake.prompts[0].tools
    assert [tool["function"]["name"] for tool in json.loads(data or b"[]")] == shown
    grammar = fake.sampling[0].grammar
    if kind is None:
        assert grammar is None
        return
    form = json.loads(grammar.source)["format"]
    assert form["type"] == kind
    assert set(re.findall(r'\\"name\\": \\"(\w+)', grammar.source)) == set(forced)


async def test_a_structured_answer_may_be_a_call_instead() -> None:
    fake = writing("{}")
    async with asking(fake, forms("qwen3_5")) as client:
        await create(client, tools=[BARE], response_format={"type": "json_object"})
        await create(client, response_format={"type": "json_object"})
    thought, _, inner = json.loads(fake.sampling[0].grammar.source)["format"]["elements"]
    assert thought["end"] == "</think>"
    assert [sampling.grammar.field for sampling in fake.sampling] == ["tools", "response_format"]
    assert [one["type"] for one in inner["elements"]] == ["tags_with_separator", "json_schema"]
    _, _, inner = json.loads(fake.sampling[1].grammar.source)["format"]["elements"]
    assert inner == {"type": "json_schema", "json_schema": {"type": "object", "additionalProperties": True}}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}
OLD_TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}],
    "triggers": ["<a>"],
}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Grammar(GrammarKind.JSON_OBJECT)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)),
        ),
        ({"response_format": TAG}, Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(TAG))),
        ({"structured_outputs": {"json": SCHEMA}}, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))),
        ({"structured_outputs": {"regex": "a+", "json": None}}, Grammar(GrammarKind.REGEX, "a+")),
        ({"structured_outputs": {"json_object": True}}, Grammar(GrammarKind.JSON_OBJECT)),
        ({"structured_outputs": {"grammar": "root ::= x"}}, Grammar(GrammarKind.EBNF, "root ::= x")),
        (
            {"structured_outputs": {"structural_tag": json.dumps(TAG)}},
            Grammar(GrammarKind.STRUCTURAL_TAG, json.dumps(TAG)),
        ),
        ({"guided_json": json.dumps(SCHEMA)}, Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))),
        ({"guided_regex": "a+"}, Grammar(GrammarKind.REGEX, "a+")),
        ({"guided_choice": ["é", "b"]}, Grammar(GrammarKind.CHOICE, '["é", "b"]')),
        ({"guided_grammar": "root ::= x"}, Grammar(GrammarKind.EBNF, "root ::= x")),
    ],
    ids=str,
)
async def test_the_form_of_an_answer(body: dict[str, Any], expected: Grammar | None) -> None:
    fake = writing("x")
    async with asking(fake) as client:
        await create(client, extra_body=body)
    made = fake.sampling[0].grammar
    if expected is None:
        assert made is None
        return
    assert (made.kind, made.source) == (expected.kind, expected.source)
    assert made.field.startswith(next(iter(body)))


async def test_the_older_structural_tag() -> None:
    fake = writing("x")
    async with asking(fake) as client:
        await create(client, extra_body={"response_format": OLD_TAG})
    form = json.loads(fake.sampling[0].grammar.source)["format"]
    assert (form["type"], form["triggers"], form["tags"][0]["end"]) == ("triggered_tags", ["<a>"], "</a>")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": ["x"]}, "tools[0].type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 1}}]},
         "tools[0].function.parameters"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": named("nobody")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("auto", "nobody")}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": allowed("often", "now")}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("f")}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs.enable_thinking"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{}", "guided_regex": "a"}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
         "messages[0].tool_calls[0].function"),
    ],
    ids=str,
)  # fmt: skip
async def test_what_cannot_be_done_is_refused_by_name(body: dict[str, Any], field: str) -> None:
    async with asking(writing("x")) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await create(client, extra_body=body)
    assert caught.value.param == field


async def test_a_model_without_calls_cannot_be_made_to_call() -> None:
    async with asking(writing("x"), forms(tool_parser="none")) as client:
        assert (await create(client, tools=TOOLS)).choices[0].message.content == "x"
        with pytest.raises(openai.BadRequestError) as caught:
            await create(client, tools=TOOLS, tool_choice="required")
    assert caught.value.param == "tool_choice"


async def test_a_stream_has_the_token_ids_of_the_prompt_once() -> None:
    async def answer() -> Pieces:
        yield dataclasses.replace(piece("Hi"), prompt_token_ids=(7, 8))
        yield piece("", FinishReason.STOP)

    async with asking(FakeClient(answer)) as client:
        fields: dict[str, Any] = {"stream": True, "n": 2, "extra_body": {"return_token_ids": True}}
        chunks = [chunk async for chunk in await create(client, **fields)]
    told = [getattr(chunk, "prompt_token_ids", None) for chunk in chunks]
    assert told == [[7, 8], *[None] * (len(chunks) - 1)]
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant", "assistant", None]
