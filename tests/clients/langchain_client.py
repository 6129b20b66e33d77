"""langchain-openai: its chat model, by both of OpenAI's routes, and its older model of texts."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import checks
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

OPTIONS: dict[str, Any] = {"base_url": checks.URL, "api_key": checks.KEY, "max_retries": 0, "timeout": 60}
PICTURE = HumanMessage(
    [
        {"type": "image_url", "image_url": {"url": checks.DATA_URL}},
        {"type": "text", "text": checks.QUESTION},
    ]
)
STANDARD_PICTURE = HumanMessage(
    content_blocks=[
        {"type": "image", "base64": checks.BASE64, "mime_type": "image/png"},
        {"type": "text", "text": checks.QUESTION},
    ]
)
WEATHER = HumanMessage("How is the weather?")
ONE_CALL = {"parallel_tool_calls": False}


def chat(**fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model=checks.MODEL, **{"max_tokens": 200, "temperature": 0, **OPTIONS, **fields})


def check_chat() -> None:
    for message in (PICTURE, STANDARD_PICTURE):
        answer = chat().invoke([message])
        checks.red_star(answer.text)
        assert answer.usage_metadata is not None
        assert answer.response_metadata["finish_reason"] == "stop"


def check_parameters() -> None:
    answer = chat(
        seed=1, top_p=0.9, logprobs=True, top_logprobs=2, stop=["."], reasoning_effort="low"
    ).invoke("Hi")
    assert answer.response_metadata["logprobs"]["content"]
    assert chat(n=2, extra_body={"top_k": 5}).generate([[PICTURE]]).generations[0][1].text


def check_stream() -> None:
    chunks = list(chat(stream_usage=True).stream([PICTURE]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    checks.red_star(whole.text)
    assert whole.usage_metadata["output_tokens"] > 0


async def check_async() -> None:
    answers = await asyncio.gather(*[chat().ainvoke([PICTURE]) for _ in range(3)])
    for answer in answers:
        checks.red_star(answer.text)
    checks.red_star("".join([chunk.text async for chunk in chat().astream([PICTURE])]))


def check_batch() -> None:
    for answer in chat().batch([[PICTURE], [STANDARD_PICTURE]]):
        checks.red_star(answer.text)


def check_second_turn() -> None:
    answer = chat().invoke([PICTURE])
    assert chat().invoke([PICTURE, answer, HumanMessage("What colour is it?")]).text


def check_tools() -> None:
    for choice in ("any", "weather"):
        asked = chat().bind_tools([checks.TOOL], tool_choice=choice, strict=True, **ONE_CALL)
        answer = asked.invoke([WEATHER])
        (call,) = answer.tool_calls
        checks.one_call(call["name"], call["args"])
    result = ToolMessage("sunny", tool_call_id=call["id"])
    assert chat().bind_tools([checks.TOOL]).invoke([WEATHER, answer, result]).text


def check_tools_streamed() -> None:
    asked = chat().bind_tools([checks.TOOL], tool_choice="any", **ONE_CALL)
    chunks = list(asked.stream([WEATHER]))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    (call,) = whole.tool_calls
    checks.one_call(call["name"], call["args"])


def _structured(method: Literal["json_schema", "function_calling"]) -> None:
    asked = chat().with_structured_output(checks.Shape, method=method, strict=True, include_raw=True)
    raw = asked.invoke([PICTURE])
    assert isinstance(raw["parsed"], checks.Shape), raw["parsing_error"]
    assert chat().invoke([PICTURE, raw["raw"], *_results(raw["raw"]), HumanMessage("And now?")]).text


def _results(message: Any) -> list[ToolMessage]:
    return [ToolMessage("kept", tool_call_id=call["id"]) for call in message.tool_calls]


def check_structured_json_schema() -> None:
    _structured("json_schema")


def check_structured_function_calling() -> None:
    _structured("function_calling")


def check_structured_json_mode() -> None:
    asked = chat(logit_bias=checks.EMPTY_OBJECT).with_structured_output(checks.Anything, method="json_mode")
    assert isinstance(asked.invoke([PICTURE]), checks.Anything)


def check_responses() -> None:
    for message in (PICTURE, STANDARD_PICTURE):
        model = chat(use_responses_api=True)
        answer = model.invoke([message])
        checks.red_star(answer.text)
        assert model.invoke([message, answer, HumanMessage("What colour is it?")]).text
    checks.red_star("".join(chunk.text for chunk in model.stream([PICTURE])))
    before = answer.response_metadata["id"]
    assert model.invoke("What colour is it?", previous_response_id=before).text
    asked = model.bind_tools([checks.TOOL], tool_choice="required", **ONE_CALL)
    called = asked.invoke([WEATHER])
    (call,) = called.tool_calls
    checks.one_call(call["name"], call["args"])
    assert model.invoke([WEATHER, called, ToolMessage("sunny", tool_call_id=call["id"])]).text
    structured = model.with_structured_output(checks.Shape, method="json_schema")
    assert isinstance(structured.invoke([PICTURE]), checks.Shape)


def check_completions() -> None:
    fields: dict[str, Any] = {"max_tokens": 5, "temperature": 0}
    model = OpenAI(model=checks.MODEL, **fields, **OPTIONS)
    whole = model.invoke("What is")
    assert whole
    assert "".join(model.stream("What is")) == whole
    assert (
        len(OpenAI(model=checks.MODEL, n=2, best_of=2, **fields, **OPTIONS).generate(["A"]).generations[0])
        == 2
    )


def check_overflow() -> None:
    for fields in ({}, {"use_responses_api": True}):
        try:
            chat(**fields).invoke(checks.TOO_LONG)
        except ContextOverflowError:
            continue
        raise AssertionError("no ContextOverflowError")


if __name__ == "__main__":
    checks.run(globals())
