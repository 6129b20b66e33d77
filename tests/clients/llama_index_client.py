"""llama-index's OpenAILike: as it is by default, and as a model of chats that calls functions."""

from __future__ import annotations

from typing import Any, Literal

import checks
import pydantic
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses

OPTIONS: dict[str, Any] = {
    "model": checks.MODEL,
    "api_base": checks.URL,
    "api_key": checks.KEY,
    "max_tokens": 200,
    "temperature": 0,
    "max_retries": 0,
    "timeout": 60,
}
BLOCKS = [ImageBlock(path=checks.PICTURE, image_mimetype="image/png"), TextBlock(text=checks.QUESTION)]
PICTURE = ChatMessage(role="user", blocks=BLOCKS)


def chat(**fields: Any) -> OpenAILike:
    return OpenAILike(**{**OPTIONS, "is_chat_model": True, **fields})


def check_completions() -> None:
    """Its default."""
    model = OpenAILike(**{**OPTIONS, "max_tokens": 5})
    whole = model.complete("What is").text
    assert whole
    assert "".join(piece.delta or "" for piece in model.stream_complete("What is")) == whole
    assert model.chat([ChatMessage("Hi")]).message.content


def check_chat() -> None:
    checks.red_star(chat().chat([PICTURE]).message.content)
    checks.red_star("".join(piece.delta or "" for piece in chat().stream_chat([PICTURE])))


async def check_async() -> None:
    checks.red_star((await chat().achat([PICTURE])).message.content)
    pieces = await chat().astream_chat([PICTURE])
    checks.red_star("".join([piece.delta or "" async for piece in pieces]))


def check_second_turn() -> None:
    message = chat().chat([PICTURE]).message
    assert chat().chat([PICTURE, message, ChatMessage("What colour is it?")]).message.content


class Weather(pydantic.BaseModel):
    """Where the weather is."""

    city: Literal["Rome", "Oslo"]


def check_tools() -> None:
    model = chat(is_function_calling_model=True)
    tool = FunctionTool.from_defaults(lambda city: f"sunny in {city}", name="weather", fn_schema=Weather)
    question = ChatMessage("How is the weather?")
    answer = model.chat_with_tools([tool], chat_history=[question], tool_required=True)
    (call,) = model.get_tool_calls_from_response(answer)
    checks.one_call(call.tool_name, call.tool_kwargs)
    result = ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
    assert model.chat([question, answer.message, result]).message.content
    *_, last = model.stream_chat_with_tools([tool], chat_history=[question], tool_required=True)
    (call,) = model.get_tool_calls_from_response(last)
    checks.one_call(call.tool_name, call.tool_kwargs)


def check_structured() -> None:
    for fields in ({"is_function_calling_model": True}, {"should_use_structured_outputs": True}):
        made = chat(**fields).structured_predict(checks.Shape, PromptTemplate("A shape?"))
        assert isinstance(made, checks.Shape)
    made = chat(is_function_calling_model=True).as_structured_llm(checks.Shape).chat([PICTURE]).raw
    assert isinstance(made, checks.Shape)


def check_responses() -> None:
    model = OpenAILikeResponses(
        **{key: value for key, value in OPTIONS.items() if key != "max_tokens"}, max_output_tokens=200
    )
    checks.red_star(model.chat([PICTURE]).message.content)


if __name__ == "__main__":
    checks.run(globals())
