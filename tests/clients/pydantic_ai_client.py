"""pydantic-ai: agents with its types of output, by both of OpenAI's routes."""

from __future__ import annotations

from typing import Any

import checks
from pydantic_ai import Agent, BinaryContent, ImageUrl, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

SETTINGS: dict[str, Any] = {"max_tokens": 300, "temperature": 0, "timeout": 60}
PICTURE = [checks.QUESTION, BinaryContent(checks.PICTURE.read_bytes(), media_type="image/png")]


def provider() -> OpenAIProvider:
    return OpenAIProvider(base_url=checks.URL, api_key=checks.KEY)


def agent(kind: Any = str, model: Any = None, **settings: Any) -> Any:
    model = model or OpenAIChatModel(checks.MODEL, provider=provider())
    return Agent(model, output_type=kind, model_settings={**SETTINGS, **settings}, retries=0)


def check_text() -> None:
    answer = agent().run_sync(PICTURE)
    checks.red_star(answer.output)
    assert answer.usage.output_tokens > 0
    checks.red_star(agent().run_sync([checks.QUESTION, ImageUrl(checks.DATA_URL)]).output)


def check_settings() -> None:
    assert agent(seed=1, top_p=0.9, presence_penalty=0.1, stop_sequences=["."], logit_bias={"5": 1}).run_sync(
        "Hi"
    )
    assert agent(openai_reasoning_effort="low", openai_logprobs=True, openai_top_logprobs=2).run_sync("Hi")


async def check_async_and_stream() -> None:
    checks.red_star((await agent().run(PICTURE)).output)
    async with agent().run_stream(PICTURE) as stream:
        checks.red_star([text async for text in stream.stream_text()][-1])


def check_second_turn() -> None:
    first = agent().run_sync(PICTURE)
    assert agent().run_sync("What colour is it?", message_history=first.all_messages()).output


def check_native_output() -> None:
    answer = agent(NativeOutput(checks.Shape)).run_sync(PICTURE)
    assert isinstance(answer.output, checks.Shape)
    assert agent().run_sync("And now?", message_history=answer.all_messages()).output


def check_tool_output() -> None:
    for strict in (True, None):
        answer = agent(ToolOutput(checks.Shape, strict=strict)).run_sync(PICTURE)
        assert isinstance(answer.output, checks.Shape)
    assert agent().run_sync("And now?", message_history=answer.all_messages()).output


def check_prompted_output() -> None:
    asked = agent(PromptedOutput(checks.Anything), logit_bias=checks.EMPTY_OBJECT)
    assert isinstance(asked.run_sync(PICTURE).output, checks.Anything)


def check_tools() -> None:
    """The model answers without the function, which it was never taught to call."""
    asked = agent()

    @asked.tool_plain
    def weather(city: str) -> str:
        """How the weather is in a city."""
        return f"sunny in {city}"

    checks.red_star(asked.run_sync(PICTURE).output)


async def check_tool_output_streamed() -> None:
    async with agent(checks.Shape).run_stream(PICTURE) as stream:
        assert isinstance(await stream.get_output(), checks.Shape)


def check_responses() -> None:
    model = OpenAIResponsesModel(checks.MODEL, provider=provider())
    first = agent(model=model).run_sync(PICTURE)
    checks.red_star(first.output)
    assert agent(model=model).run_sync("What colour is it?", message_history=first.all_messages()).output
    for kind in (ToolOutput(checks.Shape), NativeOutput(checks.Shape)):
        assert isinstance(agent(kind, model).run_sync(PICTURE).output, checks.Shape)


def check_overflow() -> None:
    try:
        agent().run_sync(checks.TOO_LONG)
    except ModelHTTPError as error:
        assert error.status_code == 400
        assert error.body["code"] == "context_length_exceeded"
        return
    raise AssertionError("no ModelHTTPError")


if __name__ == "__main__":
    checks.run(globals())
