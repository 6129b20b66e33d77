"""What a chat says, as the pipeline's own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from workers.api.endpoints.chat import decode_request, refuse_unserved, to_chat_sampling, to_messages

PART = "messages[0].content[0]."


def body(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode()


def test_content_as_string_and_as_list_for_every_role() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "http://x/y", "detail": "high"}},
    ]
    for role in ("system", "user", "assistant"):
        assert to_messages(decode_request(body(messages=[{"role": role, "content": "a"}]))) == [
            ChatMessage(role, "a")
        ]
        made = to_messages(decode_request(body(messages=[{"role": role, "content": parts}])))
        assert made == [ChatMessage(role, (TextPart("a"), ImagePart(url="http://x/y")))]
    short = [{"type": "image_url", "image_url": "http://x/y"}]
    assert to_messages(decode_request(body(messages=[{"role": "user", "content": short}])))[0].content == (
        ImagePart(url="http://x/y"),
    )


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", ""),
        (b"{", ""),
        (b"[]", ""),
        (b"\xff\xfe", ""),
        (b"{}", "messages"),
        (b'{"messages": "x"}', "messages"),
        (b'{"messages": [{"content": "x"}]}', "messages[0].role"),
        (body(messages=[{"role": "user", "content": 5}]), "messages[0].content"),
        (body(messages=[{"role": "user", "content": [{"type": "audio"}]}]), "messages[0].content[0].type"),
        (
            body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            PART + "image_url",
        ),
        (body(max_tokens="many"), "max_tokens"),
        (body(temperature="hot"), "temperature"),
        (body(stream="yes"), "stream"),
        (b"[" * 100_000, ""),
    ],
)
def test_bad_bodies_are_refused_by_field(data: bytes, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_messages(decode_request(data))
    assert caught.value.info.status == 400
    assert caught.value.info.field == field


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0, "max_completion_tokens": 5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ],
)
def test_sampling_out_of_range_names_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        to_chat_sampling(decode_request(body(**fields)), {})
    assert caught.value.info.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"modalities": ["audio"]},
    ],
)
def test_what_is_not_served_is_refused_not_ignored(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        refuse_unserved(decode_request(body(**fields)))
    assert caught.value.info.field == next(iter(fields))


def test_neutral_values_pass() -> None:
    harmless = {"user": "me", "metadata": {}, "store": False}
    request = decode_request(
        body(n=1, presence_penalty=0.0, tools=[], response_format={"type": "text"}, **harmless)
    )
    refuse_unserved(request)
    assert request.n == 1
    answer = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    refuse_unserved(decode_request(body(messages=[answer])))


@pytest.mark.parametrize(
    "field", ["guided_json", "structured_outputs", "chat_template", "continue_final_message", "no_such_thing"]
)
def test_unknown_fields_are_refused_by_name(field: str) -> None:
    with pytest.raises(RequestError) as caught:
        decode_request(body(**{field: 1}))
    assert caught.value.info.field == field


def test_tool_calls_in_a_message_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        refuse_unserved(decode_request(body(messages=[{"role": "assistant", "tool_calls": [{"id": "x"}]}])))
    assert caught.value.info.field == "messages[0].tool_calls"


def test_developer_is_the_system_role() -> None:
    assert to_messages(decode_request(body(messages=[{"role": "developer", "content": "a"}]))) == [
        ChatMessage("system", "a")
    ]


def test_the_models_own_defaults_hold_where_the_request_is_silent() -> None:
    made = to_chat_sampling(decode_request(body()), {"temperature": 0.1, "top_p": 0.5, "top_k": 3})
    assert (made.temperature, made.top_p, made.top_k) == (0.1, 0.5, 3)
    made = to_chat_sampling(
        decode_request(body(temperature=1, top_k=0, max_tokens=3, max_completion_tokens=5)),
        {"temperature": 0.1, "top_k": 3},
    )
    assert (made.temperature, made.top_k, made.max_tokens) == (1, 0, 5)


def test_everything_that_is_asked_for_arrives() -> None:
    asked = {
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "min_p": 0.1,
        "min_tokens": 2, "stop_token_ids": [5],
        "logit_bias": {"7": -3}, "logprobs": True, "top_logprobs": 4,
    }  # fmt: skip
    made = to_chat_sampling(decode_request(body(**asked)), {"repetition_penalty": 1.05})
    expected = {**asked, "stop_token_ids": (5,), "logit_bias": {7: -3}, "logprobs": 4}
    assert {name: getattr(made, name) for name in expected if name != "top_logprobs"} == {
        k: v for k, v in expected.items() if k != "top_logprobs"
    }
    assert to_chat_sampling(decode_request(body()), {"repetition_penalty": 1.05}).repetition_penalty == 1.05


@pytest.mark.parametrize("count", [0, -1, 33])
def test_too_many_choices_or_none_are_refused(count: int) -> None:
    with pytest.raises(RequestError) as caught:
        to_chat_sampling(decode_request(body(n=count)), {})
    assert caught.value.info.field == "n"


def test_the_number_of_choices_goes_to_the_pipeline() -> None:
    assert to_chat_sampling(decode_request(body(n=3)), {}).n == 3
    assert to_chat_sampling(decode_request(body()), {}).n == 1
