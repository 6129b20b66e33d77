"""litellm: by its providers for such servers, and what it converts from other APIs."""

from __future__ import annotations

from typing import Any

import checks
import litellm

PROVIDERS = ("openai", "hosted_vllm", "litellm_proxy", "lm_studio", "llamafile")
OPTIONS: dict[str, Any] = {"api_base": checks.URL, "api_key": checks.KEY, "timeout": 60, "num_retries": 0}
PICTURE: Any = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": checks.DATA_URL}},
            {"type": "text", "text": checks.QUESTION},
        ],
    }
]
WEATHER: Any = [{"role": "user", "content": "How is the weather?"}]


def ask(messages: Any = PICTURE, provider: str = "openai", **fields: Any) -> Any:
    options = {"max_tokens": 200, "temperature": 0, **OPTIONS, **fields}
    return litellm.completion(model=f"{provider}/{checks.MODEL}", messages=messages, **options)


def check_providers() -> None:
    for provider in PROVIDERS:
        checks.red_star(ask(provider=provider).choices[0].message.content)


def check_parameters() -> None:
    ask(seed=1, n=2, top_p=0.9, stop=["."], logprobs=True, top_logprobs=2, user="u", presence_penalty=0.1)
    for provider in ("openai", "hosted_vllm"):
        ask(provider=provider, reasoning_effort="low", drop_params=True)
    thinking = {"type": "enabled", "budget_tokens": 1024}
    ask(provider="hosted_vllm", thinking=thinking)


def check_stream() -> None:
    for provider in ("openai", "hosted_vllm"):
        chunks = list(ask(provider=provider, stream=True, stream_options={"include_usage": True}))
        checks.red_star("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
        assert litellm.stream_chunk_builder(chunks).usage.completion_tokens > 0


async def check_async() -> None:
    fields: Any = {"model": f"openai/{checks.MODEL}", "messages": PICTURE, **OPTIONS}
    checks.red_star((await litellm.acompletion(**fields)).choices[0].message.content)
    stream = await litellm.acompletion(stream=True, **fields)
    checks.red_star("".join([chunk.choices[0].delta.content or "" async for chunk in stream]))


def check_second_turn() -> None:
    for provider in ("openai", "hosted_vllm"):
        message = ask(provider=provider).choices[0].message
        for sent in (message, message.model_dump()):
            again = [*PICTURE, sent, {"role": "user", "content": "What colour is it?"}]
            assert ask(again, provider).choices[0].message.content


def check_file_part() -> None:
    file = {"type": "file", "file": {"file_data": checks.DATA_URL}}
    text = {"type": "text", "text": checks.QUESTION}
    for provider in ("openai", "hosted_vllm"):
        answer = ask([{"role": "user", "content": [file, text]}], provider)
        checks.red_star(answer.choices[0].message.content)


def check_tools() -> None:
    fields: Any = {"tools": [checks.TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    message = ask(WEATHER, "hosted_vllm", **fields).choices[0].message
    (call,) = message.tool_calls
    checks.one_call(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "sunny"}
    for provider in ("openai", "hosted_vllm"):
        assert ask([*WEATHER, message, result], provider, tools=[checks.TOOL]).choices[0].message.content
    whole = litellm.stream_chunk_builder(list(ask(WEATHER, stream=True, **fields)))
    (call,) = whole.choices[0].message.tool_calls
    checks.one_call(call.function.name, call.function.arguments)


def check_structured() -> None:
    content = ask(response_format=checks.Shape).choices[0].message.content
    checks.Shape.model_validate_json(content)
    closes = {"response_format": {"type": "json_object"}, "logit_bias": checks.EMPTY_OBJECT}
    assert ask(**closes).choices[0].message.content == "{}"


def check_completions() -> None:
    for provider in ("text-completion-openai", "hosted_vllm"):
        fields: Any = {"model": f"{provider}/{checks.MODEL}", "max_tokens": 4, **OPTIONS}
        assert litellm.text_completion(prompt="What is", **fields).choices[0].text
        chunks = list(litellm.text_completion(prompt="What is", stream=True, **fields))
        assert "".join(chunk.choices[0].text or "" for chunk in chunks)


def check_responses() -> None:
    image = {"type": "input_image", "image_url": checks.DATA_URL}
    items: Any = [
        {"role": "user", "content": [image, {"type": "input_text", "text": checks.QUESTION}]},
    ]
    for provider in ("openai", "hosted_vllm"):
        answer = litellm.responses(model=f"{provider}/{checks.MODEL}", input=items, **OPTIONS)
        checks.red_star(answer.output[-1].content[0].text)
    events = list(litellm.responses(model=f"openai/{checks.MODEL}", input=items, stream=True, **OPTIONS))
    assert events[-1].type == "response.completed"


async def check_anthropic_messages() -> None:
    source = {"type": "base64", "media_type": "image/png", "data": checks.BASE64}
    text = {"type": "text", "text": checks.QUESTION}
    messages: Any = [{"role": "user", "content": [{"type": "image", "source": source}, text]}]
    for provider in ("hosted_vllm", "openai"):
        answer = await litellm.anthropic.messages.acreate(
            model=f"{provider}/{checks.MODEL}", messages=messages, max_tokens=60, **OPTIONS
        )
        checks.red_star(answer["content"][0]["text"])
    ours: Any = {**OPTIONS, "api_base": checks.ROOT, "max_tokens": 60, "messages": PICTURE}
    native = litellm.completion(model=f"anthropic/{checks.MODEL}", **ours)
    checks.red_star(native.choices[0].message.content)


def check_overflow() -> None:
    for provider in ("openai", "hosted_vllm"):
        try:
            ask([{"role": "user", "content": checks.TOO_LONG}], provider)
        except litellm.ContextWindowExceededError:
            continue
        raise AssertionError(f"no ContextWindowExceededError of {provider}")


def check_errors() -> None:
    try:
        ask(top_p=9)
    except litellm.BadRequestError:
        return
    raise AssertionError("no BadRequestError")


if __name__ == "__main__":
    checks.run(globals())
