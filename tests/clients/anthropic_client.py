"""anthropic: messages and counts, by its own types."""

from __future__ import annotations

from typing import Any

import anthropic
import checks

OPTIONS: dict[str, Any] = {"base_url": checks.ROOT, "api_key": checks.KEY, "max_retries": 0, "timeout": 60}
client = anthropic.Anthropic(**OPTIONS)
SOURCE = {"type": "base64", "media_type": "image/png", "data": checks.BASE64}
PICTURE: Any = [
    {
        "role": "user",
        "content": [{"type": "image", "source": SOURCE}, {"type": "text", "text": checks.QUESTION}],
    }
]
TOOL: Any = {
    "name": "weather",
    "description": "How the weather is",
    "input_schema": checks.PARAMETERS,
    "strict": True,
}
WEATHER: Any = [{"role": "user", "content": "How is the weather?"}]


def ask(messages: Any = PICTURE, **fields: Any) -> Any:
    return client.messages.create(model=checks.MODEL, messages=messages, **{"max_tokens": 200, **fields})


def check_models() -> None:
    assert client.models.list().data[0].id == checks.MODEL
    assert client.models.retrieve(checks.MODEL).id == checks.MODEL


def check_message() -> None:
    older = {"temperature": 0, "top_k": 5}  # which today's client has no names for
    fields = {"stop_sequences": ["\n\n"], "metadata": {"user_id": "u"}, "extra_body": older}
    answer = ask(system="Be short.", **fields)
    checks.red_star(answer.content[0].text)
    assert (answer.stop_reason, answer.role) == ("end_turn", "assistant")
    assert answer.usage.output_tokens > 0


def check_second_turn() -> None:
    answer = ask()
    again = {"role": "user", "content": "What colour is it?"}
    assert ask([*PICTURE, {"role": "assistant", "content": answer.content}, again]).content[0].text
    assert ask([*PICTURE, answer.model_dump(include={"role", "content"}), again]).content[0].text


def check_cached_parts() -> None:
    system = [{"type": "text", "text": "Be short.", "cache_control": {"type": "ephemeral"}}]
    checks.red_star(ask(system=system).content[0].text)


def check_stream() -> None:
    with client.messages.stream(model=checks.MODEL, max_tokens=60, messages=PICTURE) as stream:
        checks.red_star("".join(stream.text_stream))
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens > 0
    kinds = [event.type for event in ask(stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


async def check_async() -> None:
    async with anthropic.AsyncAnthropic(**OPTIONS) as one:
        answer = await one.messages.create(model=checks.MODEL, max_tokens=60, messages=PICTURE)
        checks.red_star(answer.content[0].text)
        async with one.messages.stream(model=checks.MODEL, max_tokens=60, messages=PICTURE) as stream:
            checks.red_star("".join([text async for text in stream.text_stream]))


def check_tools() -> None:
    one_at_a_time = {"disable_parallel_tool_use": True}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        answer = ask(WEATHER, tools=[TOOL], tool_choice={**choice, **one_at_a_time})
        assert answer.stop_reason == "tool_use"
        (call,) = answer.content
        checks.one_call(call.name, call.input)
    picture = {"type": "image", "source": SOURCE}
    for content in ("sunny", [{"type": "text", "text": "sunny"}, picture]):
        result = {"type": "tool_result", "tool_use_id": call.id, "content": content}
        turns = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        assert ask([*WEATHER, *turns], tools=[TOOL]).content


def check_tools_streamed() -> None:
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    fields: Any = {"model": checks.MODEL, "max_tokens": 200, "messages": WEATHER}
    with client.messages.stream(tools=[TOOL], tool_choice=choice, **fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (call,) = stream.get_final_message().content
    checks.one_call(call.name, "".join(pieces))
    checks.one_call(call.name, call.input)


def check_tool_runner() -> None:
    @anthropic.beta_tool
    def weather(city: str) -> str:
        """How the weather is."""
        return f"sunny in {city}"

    fields: Any = {"model": checks.MODEL, "max_tokens": 60, "messages": WEATHER}
    (message,) = client.beta.messages.tool_runner(tools=[weather], **fields)
    assert message.content[0].text


def check_parse() -> None:
    answer = client.messages.parse(
        model=checks.MODEL, max_tokens=200, messages=PICTURE, output_format=checks.Shape
    )
    assert isinstance(answer.parsed_output, checks.Shape)


def check_thinking() -> None:
    """A model that does not think takes the field."""
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    checks.red_star(ask(thinking=thinking, max_tokens=1100).content[0].text)
    checks.red_star(ask(thinking={"type": "disabled"}).content[0].text)


def check_count() -> None:
    counted = client.messages.count_tokens(model=checks.MODEL, messages=PICTURE, tools=[TOOL])
    usage = ask(tools=[TOOL]).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def check_errors() -> None:
    for kind, fields in (
        (anthropic.BadRequestError, {"messages": [{"role": "user", "content": checks.TOO_LONG}]}),
        (anthropic.BadRequestError, {"tool_choice": {"type": "any"}}),
        (anthropic.NotFoundError, {"model": "other"}),
    ):
        try:
            client.messages.create(**{"model": checks.MODEL, "max_tokens": 8, "messages": WEATHER, **fields})
        except kind as error:
            assert error.body["type"] == "error", error.body
            assert error.request_id
        else:
            raise AssertionError(f"taken: {list(fields)}")


if __name__ == "__main__":
    checks.run(globals())
