"""openai: chats, completions, responses and models, by its own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import checks
import openai

OPTIONS: dict[str, Any] = {"base_url": checks.URL, "api_key": checks.KEY, "max_retries": 0, "timeout": 60}
client = openai.OpenAI(**OPTIONS)
PICTURE: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": checks.DATA_URL, "detail": "auto"}},
            {"type": "text", "text": checks.QUESTION},
        ],
    }
]
WEATHER: Any = [{"role": "user", "content": "How is the weather?"}]
ITEMS: Any = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": checks.DATA_URL, "detail": "auto"},
            {"type": "input_text", "text": checks.QUESTION},
        ],
    }
]
FUNCTION: Any = {"type": "function", **checks.FUNCTION, "strict": True}


def ask(messages: Any = PICTURE, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=checks.MODEL, messages=messages, **{"max_tokens": 200, "temperature": 0, **fields}
    )


def check_models() -> None:
    (model,) = client.models.list().data
    assert model.id == checks.MODEL
    assert client.models.retrieve(model.id) == model


def check_chat() -> None:
    answer = ask()
    checks.red_star(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def check_parameters() -> None:
    fields = {"seed": 1, "n": 2, "stop": ["."], "presence_penalty": 0.1, "frequency_penalty": 0.1}
    answer = ask(logprobs=True, top_logprobs=2, top_p=0.9, temperature=1, user="u", **fields)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 2
    ask(reasoning_effort="low", service_tier="auto", store=False, metadata={"a": "b"}, verbosity="low")
    ask(max_completion_tokens=8, max_tokens=openai.omit, prompt_cache_key="k", safety_identifier="s")


def check_stream() -> None:
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    checks.red_star("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    assert chunks[-1].usage.completion_tokens > 0


def check_stream_helper() -> None:
    with client.chat.completions.stream(model=checks.MODEL, messages=PICTURE, max_tokens=60) as stream:
        kinds = {event.type for event in stream}
        checks.red_star(stream.get_final_completion().choices[0].message.content)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def check_stream_left_early() -> None:
    with ask(stream=True) as stream:
        next(iter(stream))
    checks.red_star(ask().choices[0].message.content)


async def check_async() -> None:
    async with openai.AsyncOpenAI(**OPTIONS) as one:
        made = [
            one.chat.completions.create(model=checks.MODEL, messages=PICTURE, max_tokens=60, temperature=0)
            for _ in range(8)
        ]
        for answer in await asyncio.gather(*made):
            checks.red_star(answer.choices[0].message.content)
        stream = await one.chat.completions.create(
            model=checks.MODEL, messages=PICTURE, max_tokens=60, stream=True
        )
        checks.red_star("".join([chunk.choices[0].delta.content or "" async for chunk in stream]))


def check_second_turn() -> None:
    message = ask().choices[0].message
    for sent in (message, message.model_dump(), message.model_dump(exclude_none=True)):
        assert (
            ask([*PICTURE, sent, {"role": "user", "content": "What colour is it?"}])
            .choices[0]
            .message.content
        )


def check_developer_message() -> None:
    assert ask([{"role": "developer", "content": "Be short."}, *PICTURE]).choices[0].message.content


def check_file_part() -> None:
    file = {"type": "file", "file": {"filename": "star.png", "file_data": checks.DATA_URL}}
    text = {"type": "text", "text": checks.QUESTION}
    checks.red_star(ask([{"role": "user", "content": [file, text]}]).choices[0].message.content)


def check_tools() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = ask(WEATHER, tools=[checks.TOOL], tool_choice=choice, parallel_tool_calls=False).choices[0]
        (call,) = answer.message.tool_calls
        checks.one_call(call.function.name, call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        second = ask([*WEATHER, answer.message, result], tools=[checks.TOOL])
        assert second.choices[0].message.content
    for choice in ("auto", "none", openai.omit):
        assert ask(WEATHER, tools=[checks.TOOL], tool_choice=choice).choices[0].message.content


SHAPE_CALL: Any = {
    "model": checks.MODEL,
    "messages": WEATHER,
    "tools": [openai.pydantic_function_tool(checks.Shape)],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 200,
}


def check_tools_streamed() -> None:
    with client.chat.completions.stream(**SHAPE_CALL) as stream:
        events = list(stream)
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, checks.Shape)
    pieces = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(piece.arguments_delta for piece in pieces) == call.function.arguments


def check_parse() -> None:
    answer = client.chat.completions.parse(
        model=checks.MODEL, messages=PICTURE, response_format=checks.Shape, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed, checks.Shape)
    again = [*PICTURE, answer.choices[0].message, {"role": "user", "content": "And now?"}]
    assert ask(again).choices[0].message.content


def check_parse_tools() -> None:
    answer = client.chat.completions.parse(**SHAPE_CALL)
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, checks.Shape)


def check_json_object() -> None:
    format_ = {"type": "json_object"}
    content = ask(response_format=format_, logit_bias=checks.EMPTY_OBJECT).choices[0].message.content
    assert json.loads(content) == {}


def check_completions() -> None:
    fields: Any = {"model": checks.MODEL, "max_tokens": 5, "temperature": 0}
    whole = client.completions.create(prompt="What is", logprobs=1, echo=True, **fields).choices[0]
    assert whole.text.startswith("What is")
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs)
    several = client.completions.create(prompt=["What is", "A star"], n=2, **fields)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    chunks = list(client.completions.create(prompt="What is", stream=True, **fields))
    assert "What is" + "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert client.completions.create(prompt=[70, 71, 72], **fields).usage.prompt_tokens == 3


def check_responses() -> None:
    answer = client.responses.create(model=checks.MODEL, input=ITEMS, temperature=0)
    checks.red_star(answer.output_text)
    assert answer.usage.output_tokens > 0
    second = client.responses.create(
        model=checks.MODEL, input="What colour is it?", previous_response_id=answer.id
    )
    assert second.output_text
    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    assert client.responses.input_items.list(answer.id).data[0].content
    client.responses.delete(answer.id)
    items = [*ITEMS, *answer.output, {"role": "user", "content": "What colour is it?"}]
    assert client.responses.create(model=checks.MODEL, input=items, instructions="Be short.").output_text


def check_responses_streamed() -> None:
    events = list(client.responses.create(model=checks.MODEL, input=ITEMS, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    checks.red_star(text)
    assert events[-1].type == "response.completed"
    with client.responses.stream(model=checks.MODEL, input=ITEMS, text_format=checks.Shape) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, checks.Shape)


def check_responses_parse() -> None:
    answer = client.responses.parse(model=checks.MODEL, input=ITEMS, text_format=checks.Shape)
    assert isinstance(answer.output_parsed, checks.Shape)
    items = [*ITEMS, *answer.output, {"role": "user", "content": "And now?"}]
    assert client.responses.create(model=checks.MODEL, input=items).output_text


def check_responses_tools() -> None:
    fields: Any = {"model": checks.MODEL, "tools": [FUNCTION], "max_output_tokens": 200}
    answer = client.responses.create(
        input="Weather?", tool_choice="required", parallel_tool_calls=False, **fields
    )
    (call,) = answer.output
    checks.one_call(call.name, call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    question = {"role": "user", "content": "Weather?"}
    assert client.responses.create(input=[question, call, result], **fields).output_text
    assert client.responses.create(input=[result], previous_response_id=answer.id, **fields).output_text


def check_responses_tools_streamed() -> None:
    with client.responses.stream(
        model=checks.MODEL,
        input="Weather?",
        tools=[openai.pydantic_function_tool(checks.Shape)],
        tool_choice="required",
        parallel_tool_calls=False,
    ) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        (call,) = stream.get_final_response().output
    assert isinstance(call.parsed_arguments, checks.Shape)
    assert "".join(deltas) == call.arguments


async def check_responses_async() -> None:
    async with openai.AsyncOpenAI(**OPTIONS) as one:
        checks.red_star((await one.responses.create(model=checks.MODEL, input=ITEMS)).output_text)


def refused(kind: type[openai.APIStatusError], function: Any, **fields: Any) -> Any:
    try:
        function(**fields)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def check_errors() -> None:
    error = refused(openai.BadRequestError, ask, messages=[{"role": "user", "content": checks.TOO_LONG}])
    assert (error.code, error.type) == ("context_length_exceeded", "invalid_request_error")
    assert error.request_id
    assert refused(openai.BadRequestError, ask, top_p=9).param == "top_p"
    assert refused(openai.NotFoundError, client.models.retrieve, model="other").code == "model_not_found"
    missing: Any = {"model": checks.MODEL, "input": "x", "previous_response_id": "resp_none"}
    assert (
        refused(openai.NotFoundError, client.responses.create, **missing).code
        == "previous_response_not_found"
    )
    refused(openai.NotFoundError, client.embeddings.create, model=checks.MODEL, input="x")
    refused(openai.NotFoundError, client.files.list)


def check_raw_response() -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=checks.MODEL, messages=PICTURE, max_tokens=4, extra_headers={"x-request-id": "mine"}
    )
    assert raw.headers["x-request-id"] == "mine"
    assert raw.parse().choices[0].message.content


if __name__ == "__main__":
    checks.run(globals())
