"""OpenAI's Responses API: through OpenAI's own client, over a real socket and a stand-in for the pipeline."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from pipeline.client.client import Piece
from pipeline.parsers.forms import ChatForms
from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.errors import RequestError
from pipeline.wire.packing import pack_int32
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart, ToolCall
from pipeline.wire.sampling import FinishReason, GrammarKind, SamplingParams
from tests.workers.api.endpoints.test_messages import FORMS, THINKS_AND_CALLS, Writer
from tests.workers.api.serving import endpoint, serving
from workers.api.budget import Budget
from workers.api.chat_request import check_chat, to_messages
from workers.api.json_bodies import decode_json
from workers.api.response_store import ResponseStore
from workers.api.responses_request import (
    ResponsesRequest,
    check_responses,
    to_chat_request,
    to_items,
)
from workers.api.responses_request import to_messages as responses_messages

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
FILE = {"type": "input_image", "file_id": "f"}


def messages(given: Any, **fields: Any) -> list[ChatMessage]:
    request = decode_json(json.dumps({"input": given, **fields}).encode(), ResponsesRequest)
    check_responses(request)
    chat = to_chat_request(request, to_items(request.input))
    check_chat(chat)
    return to_messages(chat)


def test_a_text_and_instructions() -> None:
    assert messages("Hi", instructions="Be brief.") == [
        ChatMessage("system", "Be brief."),
        ChatMessage("user", "Hi"),
    ]


def test_parts_calls_results_and_thoughts() -> None:
    picture = {"type": "input_image", "image_url": "http://x/y", "detail": "auto", "file_id": None}
    thought = {"type": "reasoning_text", "text": "Hm."}
    asked = {"type": "output_text", "text": "I ask.", "annotations": [], "logprobs": [], "parsed": {"a": 1}}
    found = messages(
        [
            {"role": "user", "content": [{"type": "input_text", "text": "See:"}, picture]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [thought]},
            {
                "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [asked],
            },
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "a", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "b", "arguments": '{"x": 1}'},
            {"type": "function_call_output", "call_id": "c1", "output": "one"},
            {"type": "function_call_output", "call_id": "c2", "output": [picture]},
            {"type": "message", "role": "developer", "content": "And?"},
        ]
    )  # fmt: skip
    calls = (ToolCall("c1", "a", "{}"), ToolCall("c2", "b", '{"x": 1}'))
    assert found == [
        ChatMessage("user", (TextPart("See:"), ImagePart(url="http://x/y"))),
        ChatMessage("assistant", "I ask.", tool_calls=calls, reasoning="Hm."),
        ChatMessage("tool", "one", tool_call_id="c1"),
        ChatMessage("tool", (ImagePart(url="http://x/y"),), tool_call_id="c2"),
        ChatMessage("system", "And?"),
    ]


def test_a_turn_of_many_items_is_joined_in_one_step() -> None:
    """Joined one by one, 16 MB of thoughts took two minutes of the event loop."""
    thoughts = [{"type": "reasoning", "content": [{"text": f"{index:0999}."}]} for index in range(4000)]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    started = time.process_time()
    made = responses_messages([*thoughts, *[call] * 4000])
    assert time.process_time() - started < 10
    (message,) = made
    assert (message.reasoning_content or "").endswith("3999.")
    assert (len(message.reasoning_content or ""), len(message.tool_calls or ())) == (4_000_000, 4000)


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"type": "web_search_call"}, "input[0].type"),
        ({"role": "robot", "content": "a"}, "input[0].role"),
        ({"role": "user", "content": 3}, "input[0].content"),
        ({"role": "user", "content": "a", "colour": "red"}, "input[0].colour"),
        ({"role": "user", "content": [FILE]}, "input[0].content[0].file_id"),
        ({"type": "function_call", "name": "a", "arguments": "{}"}, "input[0].call_id"),
        ({"role": "assistant", "content": [{"words": "a"}]}, "messages[0].content[0].type"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "content": [{"type": "text", "text": 3}]}, "messages[0].content[0].text"),
        ({"type": "reasoning", "content": 3}, "input[0].content"),
        ({"type": "reasoning", "content": ["a"]}, "input[0].content"),
        ({"type": "reasoning", "summary": [{"text": 3}]}, "input[0].summary[0].text"),
        ({"role": "user", "content": [{"type": "input_image"}]}, "messages[0].content[0].image_url"),
    ],
)  # fmt: skip
def test_items_that_are_not_served_are_refused_by_name(item: Any, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages([item])
    assert caught.value.info.field == field


def test_a_thought_without_a_text_and_a_picture_by_its_uuid() -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": None}], "content": []}
    picture = {"type": "input_image", "image_url": None, "uuid": "u"}
    assert messages([thought, {"role": "user", "content": [picture]}]) == [
        ChatMessage("user", (ImagePart(uuid="u"),))
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"background": True},
        {"conversation": "c"},
        {"prompt": {"id": "p"}},
        {"truncation": "auto"},
        {"n": 2},
        {"n": 0},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "name": "f", "defer_loading": True}]},
        {"text": {"format": 3}},
    ],
)
def test_fields_that_are_not_served_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        messages("a", **fields)
    assert caught.value.info.field.startswith(next(iter(fields)))


@asynccontextmanager
async def asking(writer: Writer, forms: ChatForms = FORMS, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    async with serving(endpoint(writer, forms=forms, **options)) as site:
        key = options.get("api_key", ("none",))[0]
        async with AsyncOpenAI(
            base_url=f"http://{site.host}:{site.port}/v1", api_key=key, max_retries=0
        ) as client:
            yield client


async def test_a_whole_response() -> None:
    writer = Writer("Hel", "lo")
    async with asking(writer) as client:
        found = await client.responses.create(model="m", input="Hi", temperature=0.5, max_output_tokens=7)
        assert (found.output_text, found.status) == ("Hello", "completed")
        assert found.usage is not None
        assert (found.usage.input_tokens, found.usage.output_tokens) == (10, 2)
        assert (await client.responses.retrieve(found.id)).output_text == "Hello"
        items = await client.responses.input_items.list(found.id)
        assert len(items.data) == 1
        await client.responses.delete(found.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(found.id)
    (sampling,) = writer.sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 7)


async def test_a_response_that_was_cut() -> None:
    async with asking(Writer("a", finish=FinishReason.LENGTH)) as client:
        found = await client.responses.create(model="m", input="Hi")
        assert found.status == "incomplete"
        assert found.incomplete_details is not None
        assert found.incomplete_details.reason == "max_output_tokens"


async def test_a_conversation_goes_on() -> None:
    writer = Writer("Hello")
    async with asking(writer) as client:
        first = await client.responses.create(model="m", input="Hi", instructions="Be brief.")
        second = await client.responses.create(model="m", input="And?", previous_response_id=first.id)
        await client.responses.create(model="m", input="So?", previous_response_id=second.id)
        contents = [message.content for message in writer.chats[-1].messages]
        assert contents == ["Hi", "Hello", "And?", "Hello", "So?"], "instructions are of one response"
        unstored = await client.responses.create(model="m", input="Hi", store=False)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model="m", input="x", previous_response_id=unstored.id)
        assert caught.value.code == "previous_response_not_found"


async def test_an_item_of_an_answer_may_be_referred_to() -> None:
    """As Vercel's AI SDK does in a second turn."""
    writer = Writer("Hello")
    async with asking(writer) as client:
        first = await client.responses.create(model="m", input="Hi")
        item_id = first.output[0].id
        for reference in ({"type": "item_reference", "id": item_id}, {"id": item_id, "type": None}):
            items: Any = [{"role": "user", "content": "Hi"}, reference, {"role": "user", "content": "And?"}]
            await client.responses.create(model="m", input=items)
            contents = [message.content for message in writer.chats[-1].messages]
            assert contents == ["Hi", "Hello", "And?"]
        with pytest.raises(openai.BadRequestError, match="twice"):
            await client.responses.create(model="m", input=[*items, reference])
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match="no item"):
            await client.responses.create(model="m", input=items)


async def test_a_response_belongs_to_its_key() -> None:
    async with serving(endpoint(Writer("Hello"), api_key=("one", "two"))) as site:
        url = f"http://{site.host}:{site.port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="one", max_retries=0) as mine:
            found = await mine.responses.create(model="m", input="Hi")
            await mine.responses.retrieve(found.id)
        async with AsyncOpenAI(base_url=url, api_key="two", max_retries=0) as other:
            with pytest.raises(openai.NotFoundError):
                await other.responses.retrieve(found.id)
            with pytest.raises(openai.NotFoundError):
                await other.responses.create(model="m", input="x", previous_response_id=found.id)
            reference: Any = [{"type": "item_reference", "id": found.output[0].id}]
            with pytest.raises(openai.NotFoundError):
                await other.responses.create(model="m", input=reference)


async def test_thoughts_and_calls() -> None:
    async with asking(Writer(*THINKS_AND_CALLS)) as client:
        found = await client.responses.create(model="m", input="Hi", tools=[WEATHER])
        thought, words, call = found.output
        assert (thought.type, words.type, call.type) == ("reasoning", "message", "function_call")
        assert json.loads(call.arguments) == {"city": "Köln"}
        assert found.usage is not None
        assert found.usage.output_tokens_details.reasoning_tokens > 0


async def test_a_stream_of_thoughts_text_and_calls() -> None:
    async with asking(Writer(*THINKS_AND_CALLS)) as client, client.responses.stream(
        model="m", input="Hi", tools=[WEATHER]
    ) as stream:  # fmt: skip
        events = [one async for one in stream]
        final = await stream.get_final_response()
    kinds = [one.type for one in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert kinds[-1] == "response.completed"
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    added = [one.item.id for one in events if one.type == "response.output_item.added"]
    done = [one.item.id for one in events if one.type == "response.output_item.done"]
    assert added == done == [item.id for item in final.output]
    deltas = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == {"city": "Köln"}
    for item in final.output:
        if item.type == "function_call":
            assert json.loads(item.arguments) == {"city": "Köln"}


async def test_an_answer_by_a_schema() -> None:
    class Star(BaseModel):
        colour: str

    writer = Writer('{"colour": ', '"red"}')
    async with asking(writer, forms=ChatForms(None)) as client:
        found = await client.responses.parse(model="m", input="Hi", text_format=Star)
        assert found.output_parsed == Star(colour="red")
    grammar = writer.sampling[0].grammar
    assert grammar.kind is GrammarKind.JSON_SCHEMA
    assert "colour" in grammar.source


def test_the_store_forgets_the_oldest_first() -> None:
    store = ResponseStore(10_000)
    for number in range(10):
        store.put(f"r{number}", "t", b"[]", [{"id": f"i{number}"}], {"x": "y" * 100})
    kept = [6, 7, 8, 9]
    for number in range(10):
        if number in kept:
            store.get(f"r{number}", "t")
            store.item(f"i{number}", "t", "")
        else:
            with pytest.raises(RequestError):
                store.item(f"i{number}", "t", "")
            with pytest.raises(RequestError) as caught:
                store.get(f"r{number}", "t")
            assert caught.value.info.status == 404
    store.put("large", "t", b"[]", [], {"x": "y" * 20_000})
    with pytest.raises(RequestError):
        store.get("large", "t")
    store.get("r9", "t")
    for number in kept:
        store.drop(f"r{number}", "t")
    assert (store._nbytes, store._response_of) == (0, {})


class Scorer(Writer):
    """Each piece is one token, whose log-probability tells it from the others."""

    async def _write(self, sampling: SamplingParams) -> AsyncGenerator[Piece, None]:
        async for made in super()._write(sampling):
            value = np.float32(-made.num_output_tokens).tobytes()
            yield dataclasses.replace(made, logprobs=(TokenLogprobs(pack_int32([1]), value),))


def values_of(logprobs: Any) -> list[float]:
    return [one.logprob for one in logprobs]


async def test_log_probabilities_are_those_of_the_text_whole_and_streamed() -> None:
    fields: Any = {"model": "m", "input": "Hi", "include": ["message.output_text.logprobs"]}
    async with asking(Scorer("<think>", "Hm.", "</think>", "So ", "", "be it.")) as client:
        whole = await client.responses.create(**fields)
        events = [one async for one in await client.responses.create(**fields, stream=True)]
    texts = [item.content[0] for item in whole.output if item.type == "message"]
    assert [values_of(text.logprobs) for text in texts] == [[-4, -5, -6]]
    deltas = [one.logprobs for one in events if one.type == "response.output_text.delta"]
    assert [values_of(logprobs) for logprobs in deltas] == [[-4], [-5, -6]]
    (done,) = [one.logprobs for one in events if one.type == "response.output_text.done"]
    assert values_of(done) == [-4, -5, -6]


async def test_of_an_answer_that_is_cut_only_the_last_item_is_incomplete() -> None:
    fields: Any = {"model": "m", "input": "Hi"}
    async with asking(Writer("<think>Hm.</think>", "So", finish=FinishReason.LENGTH)) as client:
        whole = await client.responses.create(**fields)
        *_, last = [one async for one in await client.responses.create(**fields, stream=True)]
    for response in (whole, last.response):
        assert [item.status for item in response.output] == ["completed", "incomplete"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        (
            {"text": {"format": {"type": "text"}}, "extra_body": {"response_format": {"type": "text"}}},
            "text.format",
        ),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
        ({"extra_body": {"return_token_ids": True}}, "return_token_ids"),
        ({"extra_body": {"regex": "a+"}}, "regex"),
    ],
)
async def test_errors_name_the_field_as_the_client_wrote_it(fields: Any, field: str) -> None:
    async with asking(Writer("a")) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="m", input="Hi", **fields)
    assert caught.value.param == field


async def test_a_stored_conversation_is_memory_of_each_request_that_goes_on_from_it() -> None:
    """Its bytes were not counted: a hundred bytes that name it made a request of megabytes."""
    budget = Budget(8 << 20)
    taken: list[int] = []

    class Watcher(Writer):
        def generate(self, *given: Any, **options: Any) -> AsyncGenerator[Piece, None]:
            taken.append(budget.num_bytes)
            return super().generate(*given, **options)

    async with asking(Watcher("a"), budget=budget) as client:
        first = await client.responses.create(model="m", input="x" * (3 << 20))
        second = await client.responses.create(
            model="m", input="x" * (2 << 20), previous_response_id=first.id
        )
        with pytest.raises(openai.InternalServerError) as caught:
            await client.responses.create(model="m", input="x" * (2 << 20), previous_response_id=second.id)
    assert caught.value.status_code == 503
    assert taken[1] > 5 << 20
    assert budget.num_bytes == 0


async def test_an_option_of_the_template_is_short() -> None:
    """Where a prompt leaves the model is kept by its options: 256 texts of 60 MB each."""
    async with asking(Writer("a")) as client:
        fields: Any = {"chat_template_kwargs": {"reasoning_effort": "x" * 257}}
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(model="m", input="Hi", extra_body=fields)
    assert caught.value.param == "chat_template_kwargs.reasoning_effort"


def test_each_reference_reads_its_own_item_only() -> None:
    """References to 2000 items of one answer read the whole answer 2000 times."""
    store = ResponseStore()
    items = [{"id": f"fc_{index}", "arguments": "x" * 100} for index in range(2000)]
    store.put("resp_1", "t", b"[]", items, {})
    started = time.process_time()
    assert [store.item(item["id"], "t", "input") for item in items] == items
    assert time.process_time() - started < 0.3
    assert store.items("resp_1", "t") == items


async def test_items_are_counted_before_anything_walks_over_them() -> None:
    """Also those of the conversation before. What is wrong with the first is not looked at."""
    turn, robot = {"role": "user", "content": "a"}, {"role": "robot", "content": [{"type": "x"}] * 20_000}
    async with asking(Writer("a")) as client:
        stored = await client.responses.create(model="m", input="", extra_body={"input": [turn] * 1000})
        for given, before in (
            ([{"role": "robot"}, *[turn] * 20_000], None),
            ([robot], None),
            ([*[turn] * 15_500, {"role": "robot"}], stored.id),
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(
                    model="m", input="", previous_response_id=before, extra_body={"input": given}
                )
            assert caught.value.param == "input"
            assert "the limit is 16384" in caught.value.message
