"""Whatever a body says, it is served or refused: with the chat's, which says most."""

from __future__ import annotations

import json
import random
import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from pipeline.parsers.forms import ChatForms
from pipeline.wire.clients import SubmitRequest
from pipeline.wire.errors import RequestError
from pipeline.wire.limits import MAX_MESSAGES, MAX_PARTS
from tests.workers.api.endpoints.test_chat import body, decode_request
from tests.workers.api.serving import FakeClient, post, serving
from tests.workers.api.serving import endpoint as server_with
from workers.api.endpoints.base import ServedModel
from workers.api.endpoints.chat import ChatCompletions
from workers.api.json_bodies import MAX_DEPTH, decode_fields


def endpoint() -> ChatCompletions:
    info = cast(Any, SimpleNamespace(default_sampling={}))
    return ChatCompletions(ServedModel("m", info, 0, ChatForms(None), is_strict=True))


def submitted(data: bytes) -> bytes:
    """What a body becomes on the wire. Raises RequestError, and nothing else."""
    submission = endpoint().decode(data)
    made = SubmitRequest(
        client_id=b"c" * 16, request_id="r", attempt=1, prompt=submission.prompt,
        sampling=submission.sampling, priority=submission.priority,
    )  # fmt: skip
    return msgspec.msgpack.encode(made)


def refused(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        submitted(data)
    info = caught.value.info
    assert info.status == 400
    assert len(info.message) <= 300
    assert len(info.field) <= 200
    info.message.encode()
    return caught.value


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [20, 500, 900, 980, 2000, 200_000])
@pytest.mark.parametrize(
    "field", ["tools", "tool_choice", "response_format", "messages", "metadata", "no_such"]
)
def test_values_nested_deep_are_a_400(field: str, depth: int) -> None:
    chat = '"messages": [{"role": "user", "content": "hi"}], '
    refused(f'{{{chat if field != "messages" else ""}"{field}": {nested(depth)}}}'.encode())


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 900])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", '"messages": [], "tools": [{"type": "function", "function": {"name": %s}}]'),
        ("/v1/responses", '"input": "a", "tools": [{"type": "function", "name": "a", "description": %s}]'),
        ("/v1/responses", '"input": "a", "text": {"verbosity": %s}'),
        (
            "/v1/messages",
            '"max_tokens": 1, "messages": [], "tools": [{"name": "a", "input_schema": {"a": %s}}]',
        ),
    ],
)
async def test_what_is_written_again_is_not_nested_deep(path: str, body: str, depth: int) -> None:
    async with serving(server_with(FakeClient())) as site:
        answer = await site.ask(post(f"{{{body % nested(depth)}}}".encode(), path=path))
    assert answer.status == 400
    assert b"nested too deep" in answer.body


async def test_signs_in_texts_and_beside_each_other_are_not_deep() -> None:
    many = json.dumps([{"role": "user", "content": "[{" * 100}] * (MAX_DEPTH + 1))
    async with serving(server_with(FakeClient())) as site:
        assert (await site.ask(post(f'{{"messages": {many}}}'.encode()))).status == 200


@pytest.mark.parametrize("depth", range(MAX_DEPTH, 1000, 9))
async def test_json_in_a_text_that_is_nested_deep_is_no_mistake_of_ours(depth: int) -> None:
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "guided_json": '{"a":' * depth + "1" + "}" * depth,
    }
    async with serving(server_with(FakeClient())) as site:
        assert (await site.ask(post(json.dumps(body).encode()))).status in (200, 400)


@pytest.mark.parametrize("place", ["part", "object", "content", "tool_calls"])
def test_values_nested_deep_inside_a_message_are_a_400(place: str) -> None:
    deep = nested(900)
    content = {
        "part": f'[{{"type": "image_url", "x": {deep}}}]',
        "object": f'[{{"type": "image_url", "image_url": {{"url": "http://x/y", "x": {deep}}}}}]',
        "content": deep,
        "tool_calls": f'"hi", "tool_calls": {deep}',
    }[place]
    refused(f'{{"messages": [{{"role": "user", "content": {content}}}]}}'.encode())


INTEGERS = (
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "top_k",
    "n",
    "top_logprobs",
    "min_tokens",
    "priority",
)
NUMBERS = (
    "18446744073709551616",
    "-9223372036854775809",
    "1" + "0" * 30,
    "1" + "0" * 4000,
    "1" + "0" * 5000,
    "1e400",
)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:25] + str(len(number)))
@pytest.mark.parametrize("field", [*INTEGERS, "temperature", "stop_token_ids", "logit_bias"])
def test_numbers_beyond_64_bits_are_refused_by_name(field: str, number: str) -> None:
    value = {"stop_token_ids": f"[{number}]", "logit_bias": f'{{"{number}": 1}}'}.get(field, number)
    extra = '"logprobs": true, ' if field == "top_logprobs" else ""
    chat = '"messages": [{"role": "user", "content": "hi"}]'
    error = refused(f'{{{chat}, {extra}"{field}": {value}}}'.encode())
    if len(number) < 4300:
        assert error.info.field.startswith(field)


class Inner(msgspec.Struct, frozen=True):
    count: int = 0


class Outer(msgspec.Struct):
    inner: Inner = Inner()
    items: list[Inner] = []
    ratio: float = 1.0
    name: str = ""


def test_null_is_a_field_left_out_and_whole_floats_are_integers() -> None:
    data = {"inner": {"count": 3.0}, "items": [{"count": None}, {"count": 2}], "ratio": None, "name": None}
    request, unknown = decode_fields(msgspec.json.encode(data), Outer)
    assert request == Outer(inner=Inner(3), items=[Inner(), Inner(2)])
    assert not unknown


def test_unknown_fields_are_told_by_their_path_unless_they_are_unset() -> None:
    data = {
        "x": 1,
        "empty": [],
        "none": None,
        "text": "",
        "inner": {"y": False},
        "items": [{}, {"z": {"a": 1}}],
    }
    request, unknown = decode_fields(msgspec.json.encode(data), Outer)
    assert request == Outer(items=[Inner(), Inner()])
    assert unknown == {"x": 1, "inner.y": False, "items[1].z": {"a": 1}}


@pytest.mark.parametrize("data", [b"[]", b"null", b"3", b'"x"'])
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError, match="must be a JSON object"):
        decode_fields(data, Outer)


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part]}]}


SURROGATE = "\ud83d"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": f"cut {SURROGATE}"}]},
        {"messages": [{"role": SURROGATE, "content": "x"}]},
        {"messages": [{"role": "user", "content": "x", "name": SURROGATE}]},
        with_part({"type": "text", "text": SURROGATE}),
        with_part({"type": SURROGATE, "text": "x"}),
        with_part({"type": "image_url", "image_url": {"url": f"data:image/png,{SURROGATE}"}}),
        with_part({"type": "image_url", "image_url": {"url": f"data:;base64,{SURROGATE}"}}),
        with_part({"type": "image_url", "image_url": "http://x/y", "uuid": SURROGATE}),
        {"stop": [SURROGATE]},
        {"stop": SURROGATE},
        {"model": SURROGATE},
        {"cache_salt": SURROGATE},
        {"metadata": {SURROGATE: "x"}},
        {SURROGATE: 1},
    ],
)
def test_half_a_character_is_a_400_wherever_it_stands(fields: dict[str, Any]) -> None:
    name = next(iter(fields))
    assert refused(body(**fields)).info.field.startswith("" if name == SURROGATE else name)
    raw = json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}, ensure_ascii=False)
    refused(raw.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"name": "x" * 10**6}] * 9},
        {"tool_choice": "x" * 10**6},
        {"response_format": {"x" * 10**6: 1}},
        {"x" * 10**6: 1},
        {"temperature": "x" * 10**6},
        with_part({"type": "x" * 10**6}),
        with_part({"type": "text", "text": "a", "x" * 10**6: 1}),
        with_part({"type": "image_url", "image_url": ["x" * 10**6]}),
        {"logit_bias": {"x" * 10**6: 1}},
    ],
)
def test_an_error_echoes_little_of_what_was_sent(fields: dict[str, Any]) -> None:
    refused(body(**fields))


def test_messages_and_parts_are_counted_before_anything_walks_over_them() -> None:
    part, turn = {"type": "text", "text": "a"}, {"role": "user", "content": "hi"}
    submitted(body(messages=[turn] * MAX_MESSAGES))
    submitted(body(messages=[{"role": "user", "content": [part] * MAX_PARTS}]))
    submitted(body(messages=[{"role": "user", "content": "{}[]," * 100_000}]))
    half = {"role": "user", "content": [part] * (MAX_PARTS // 2 + 1)}
    for messages in ([turn] * (MAX_MESSAGES + 1), [half, half]):
        assert "the limit is" in str(refused(body(messages=messages)))
    many = b'{"messages": [' + b",".join([b'{"role":"user"}'] * 100_000) + b"]}"
    assert "100000 messages" in str(refused(many))


@pytest.mark.parametrize(
    ("value", "sign"),
    [(b"[]", "["), (b"{}", "{"), (b'{"a":[]}', "{"), (b"1", ","), (b'""', ",")],
)
def test_a_body_of_millions_of_small_values_is_refused_before_anything_is_made_of_them(
    value: bytes, sign: str
) -> None:
    """16 MiB of them stopped the event loop for seconds."""
    many = (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": ['
        + b",".join([value] * (16 << 20 >> len(value).bit_length()))
        + b"]}"
    )
    start = time.process_time()
    with pytest.raises(RequestError, match="the limit is") as refusal:
        decode_request(many)
    assert refusal.value.info.status == 400
    assert repr(sign) in str(refusal.value)
    assert time.process_time() - start < 0.5


def test_a_body_of_many_numbers_with_exponents_is_refused_before_it_is_decoded() -> None:
    """1.5 MiB of them took the decoder 2.1 s."""
    hidden = b'{"\\\\": "\\"", "tools": [' + b"1.5e300," * 5000 + b"1]}"
    many = b'{"tools": [' + b"1.5E300,\n" * 190_000 + b"1]}"
    for data in (hidden, many):
        start = time.process_time()
        with pytest.raises(RequestError, match="numbers with an exponent than the limit") as refusal:
            decode_request(data)
        assert refusal.value.info.status == 400
        assert time.process_time() - start < 0.3


@pytest.mark.parametrize("number", ["1.5e300, ", '\\"1.5e300, ', "\\\\, 1e5 ", "true, "])
def test_text_may_have_as_many_numbers_with_exponents_as_it_likes(number: str) -> None:
    data = f'{{"messages": [{{"role": "user", "content": "{number * 5000}"}}]}}'.encode()
    assert decode_request(data).messages[0].content == json.loads(f'"{number * 5000}"')


NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**63, 2**64, -(2**64), 10**30, 0.5, -0.0, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "x", "\x00", SURROGATE, "x" * 3000),
    *("data:", "data:,", f"data:,{SURROGATE}", "data:;base64,%", ["data:,x"], {"url": None}, {"url": 5}),
    *([], {}, [None], [[]], {"a": None}, {"": {}}, [1, "a"], {"url": "http://x/y", "detail": "low"}),
    *("text", "image_url", "video_url", "image", "video"),
)
KEYS = (
    *INTEGERS,
    *(
        "messages",
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "video_url",
        "image",
        "video",
        "url",
        "uuid",
    ),
    *("detail", "min_pixels", "max_pixels", "fps", "nframes", "max_frames", "min_frames", "total_pixels"),
    *("video_start", "video_end", "resized_height", "resized_width", "cache_control", "x", SURROGATE),
    *("stop", "tools", "temperature", "logit_bias", "stop_token_ids", "model", "metadata"),
)
JUNK = (b"", b'"', b"[", b"}", b"\\ud800", b"\xed\xa0\x80", b"9" * 30, b"1e999", b"NaN")


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a body: its container and its key there."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(value, dict | list):
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    return [(value, key) for key, _ in pairs] + [node for _, child in pairs for node in nodes(child)]


def good() -> Any:
    picture = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AAAA", "detail": "auto"},
        "uuid": "u",
    }
    video = {
        "type": "video_url",
        "video_url": {"url": "data:video/jpeg;base64,AAAA,AAAA", "fps": 2.0},
        "max_frames": 8,
    }
    qwen = {"type": "image", "image": "http://x/y", "min_pixels": 784}
    parts = [{"type": "text", "text": "a"}, picture, video, qwen]
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    sampling = {"temperature": 0.5, "seed": 3, "stop": ["x"], "max_tokens": 5, "logit_bias": {"5": 1}}
    return {"messages": turns, **sampling, "stop_token_ids": [4], "tools": [], "stream": False, "priority": 0}


def mutated(rng: random.Random) -> bytes:
    made = good()
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(nodes(made))
        what = rng.random()
        if what < 0.5 or not isinstance(container, dict):
            container[key] = rng.choice(NASTY)
        elif what < 0.8:
            container[rng.choice(KEYS)] = rng.choice(NASTY)
        else:
            del container[key]
        if not nodes(made):
            break
    data = bytearray(json.dumps(made).encode())
    if rng.random() < 0.3:
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.randint(0, 3)] = rng.choice(JUNK)
    return bytes(data)


def test_whatever_is_sent_is_served_or_a_400() -> None:
    rng = random.Random(25)
    num_served = 0
    for number in range(2000):
        data = mutated(rng)
        info = None
        try:
            submitted(data)
            num_served += 1
        except RequestError as error:
            info = error.info
        except Exception as error:
            raise AssertionError(f"{number}: {data!r}") from error
        assert info is None or (info.status == 400 and len(info.message) <= 300), (number, data)
        msgspec.json.encode(info)
    assert 100 < num_served < 1900, "neither nothing nor everything is refused"
