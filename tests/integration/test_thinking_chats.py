"""Chats of Qwen3.5, whose template thinks by default, through the whole pipeline and all endpoints."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from pipeline.families import read_model_info
from tests.integration.conftest import LIMITS
from tests.pictures import data_url, scene
from tests.servers import Server
from tools.random_checkpoint import make_checkpoint

NAME = "m"
WINDOW = 64  # tokens between two places where a state may be kept
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ENDPOINTS = (CHAT, RESPONSES, MESSAGES)
SYSTEM = "You answer in few words, and never guess. " * 10
QUESTION = "What is in the box that stands beside the door of the house? " * 6
THOUGHT = "They ask for a box, so the box has to be opened first. " * 4
RESULT = "The box has seven books and a lamp in it, and the lamp is on. " * 6
OPEN = {"name": "open", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
# Greedy, but not because a request says so.
OWN_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 1}


class Told(NamedTuple):
    """What an endpoint says, in no endpoint's form."""

    thought: str
    content: str
    calls: list[tuple[str, Any]]
    finish: str  # of an answer that is at its end by itself: stop
    num_prompt_tokens: int
    num_cached_tokens: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three places of end tokens name one each. Weights so large that the text is lively."""
    folder = tmp_path_factory.mktemp("thinking") / NAME
    make_checkpoint(folder, "qwen3.5-tiny")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        lively = {name: 5 * tensor if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
        save_file(lively, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    first = config["image_token_id"] - 12
    config["text_config"]["eos_token_id"], config["eos_token_id"] = first, first + 1
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [first + 2], **OWN_SAMPLING}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server("--model", str(folder), "--served-model-name", NAME, "--dtype", "float32", *LIMITS) as found:
        yield found


class Answered(NamedTuple):
    status: int
    body: Any


def open_request(server: Server, path: str, body: dict[str, Any]) -> IO[bytes]:
    """Raises urllib's HTTPError for a status of an error."""
    data = json.dumps({"model": NAME, **body}).encode()
    headers = {"Content-Type": "application/json"}
    found: IO[bytes] = urllib.request.urlopen(
        urllib.request.Request(f"{server.url}{path}", data, headers), timeout=60
    )
    return found


def post(server: Server, path: str, body: dict[str, Any]) -> Answered:
    try:
        with open_request(server, path, body) as response:
            return Answered(200, json.load(response))
    except urllib.error.HTTPError as error:
        with error:
            return Answered(error.code, json.load(error))


def prompt_of(server: Server, messages: list[dict[str, Any]], **fields: Any) -> str:
    answer = post(server, "/v1/chat/completions/render", {"messages": messages, **fields}).body
    return str(answer["prompt"])


def body_for(
    path: str, messages: list[dict[str, Any]], max_tokens: int = 24, **fields: Any
) -> dict[str, Any]:
    """Of messages of a chat, in the endpoint's own form. Thoughts are in `reasoning_content`, calls have
    their arguments as objects; `thinks`: whether the template shall let the model think."""
    if path == CHAT:
        return {"messages": [_of_chat(message) for message in messages], "max_tokens": max_tokens, **fields}
    if path == RESPONSES:
        items = [item for message in messages for item in _items(message)]
        return {"input": items, "max_output_tokens": max_tokens, **fields}
    system = [message["content"] for message in messages[:1] if message["role"] == "system"]
    others = [_blocks(message) for message in messages[len(system) :]]
    return {
        "messages": others,
        "max_tokens": max_tokens,
        **({"system": system[0]} if system else {}),
        **fields,
    }


def _of_chat(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for name, arguments in message.get("calls", ())
    ]
    given = {key: value for key, value in message.items() if key != "calls"}
    return {**given, "tool_calls": calls} if calls else given


def _items(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if message["role"] == "tool":
        yield {"type": "function_call_output", "call_id": "c", "output": message["content"]}
        return
    if (thought := message.get("reasoning_content")) is not None:
        yield {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]}
    if message["content"]:
        yield {"role": message["role"], "content": message["content"]}
    for name, arguments in message.get("calls", ()):
        yield {"type": "function_call", "call_id": "c", "name": name, "arguments": json.dumps(arguments)}


def _blocks(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        result = {"type": "tool_result", "tool_use_id": "c", "content": message["content"]}
        return {"role": "user", "content": [result]}
    if message["role"] != "assistant":
        return message
    blocks: list[dict[str, Any]] = []
    if (thought := message.get("reasoning_content")) is not None:
        blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
    if message["content"]:
        blocks.append({"type": "text", "text": message["content"]})
    for name, arguments in message.get("calls", ()):
        blocks.append({"type": "tool_use", "id": "c", "name": name, "input": arguments})
    return {"role": "assistant", "content": blocks}


def tools_for(path: str, function: dict[str, Any]) -> list[dict[str, Any]]:
    if path == MESSAGES:
        return [{"name": function["name"], "input_schema": function["parameters"]}]
    return [
        {"type": "function", **function} if path == RESPONSES else {"type": "function", "function": function}
    ]


def thinking(path: str, thinks: bool) -> dict[str, Any]:
    """On by default, but for the endpoint whose own models do not think unasked."""
    if path != MESSAGES:
        return {} if thinks else {"chat_template_kwargs": {"enable_thinking": False}}
    return {"thinking": {"type": "enabled", "budget_tokens": 1024}} if thinks else {}


def read(path: str, answer: Any) -> Told:
    match path:
        case "/v1/chat/completions":
            (choice,), usage = answer["choices"], answer["usage"]
            message = choice["message"]
            assert message.get("reasoning") == message.get("reasoning_content")
            calls = [call["function"] for call in message.get("tool_calls") or ()]
            return Told(
                message.get("reasoning") or "",
                message["content"] or "",
                [(call["name"], json.loads(call["arguments"])) for call in calls],
                choice["finish_reason"],
                usage["prompt_tokens"],
                (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0),
            )
        case "/v1/responses":
            parts: dict[str, list[Any]] = {"reasoning": [], "message": [], "function_call": []}
            for item in answer["output"]:
                parts[item["type"]].append(item)
            usage = answer["usage"]
            return Told(
                "".join(part["text"] for item in parts["reasoning"] for part in item["content"]),
                "".join(part["text"] for item in parts["message"] for part in item["content"]),
                [(call["name"], json.loads(call["arguments"])) for call in parts["function_call"]],
                "stop" if answer["status"] == "completed" else "length",
                usage["input_tokens"],
                usage["input_tokens_details"]["cached_tokens"],
            )
        case _:
            usage = answer["usage"]
            return Told(
                "".join(block.get("thinking", "") for block in answer["content"]),
                "".join(block.get("text", "") for block in answer["content"]),
                [(block["name"], block["input"]) for block in answer["content"] if "input" in block],
                {"max_tokens": "length", "end_turn": "stop"}.get(
                    answer["stop_reason"], answer["stop_reason"]
                ),
                usage["input_tokens"] + usage["cache_read_input_tokens"],
                usage["cache_read_input_tokens"],
            )


def streamed(server: Server, path: str, body: dict[str, Any]) -> tuple[str, str]:
    """Thought and content of a stream."""
    with open_request(server, path, {**body, "stream": True}) as response:
        lines = [line.decode() for line in response]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    thought = content = ""
    for event in events:
        delta = event["choices"][0]["delta"] if event.get("choices") else event.get("delta", {})
        match event.get("type"):
            case "response.reasoning_text.delta":
                thought += delta
            case "response.output_text.delta":
                content += delta
            case None | "content_block_delta":
                thought += delta.get("reasoning") or delta.get("thinking") or ""
                content += delta.get("content") or delta.get("text") or ""
    return thought, content


def ask(server: Server, path: str, messages: list[dict[str, Any]], **fields: Any) -> Told:
    response = post(server, path, body_for(path, messages, **fields))
    assert response.status == 200, response.body
    return read(path, response.body)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_the_prompt_opens_a_thought_unless_told(server: Server) -> None:
    assert prompt_of(server, [user("Hi")]).endswith("<|im_start|>assistant\n<think>\n")
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_of(server, [user("Hi")], **options).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_comes_is_a_thought_from_the_start_and_content_without_thinking(
    server: Server, path: str
) -> None:
    """Also in a stream: the model never writes the tag that opens the thought."""
    for thinks in (True, False):
        told = ask(server, path, [user("Hi")], **thinking(path, thinks))
        assert told.finish == "length"
        assert bool(told.thought) is thinks
        assert bool(told.content) is not thinks
        body = body_for(path, [user("Hi")], **thinking(path, thinks))
        assert streamed(server, path, body) == (told.thought, told.content)


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_call_is_read_from_xml(server: Server, path: str) -> None:
    choice = {"type": "any"} if path == MESSAGES else "required"
    function = {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "level": {"enum": [1, 2, 3]}},
            "required": ["on", "level"],
            "additionalProperties": False,
        },
    }
    fields = {"tools": tools_for(path, function), "tool_choice": choice, **thinking(path, False)}
    told = ask(server, path, [user("Light!")], max_tokens=300, **fields)
    (name, arguments), *_ = told.calls
    assert name == "light"
    assert arguments.keys() == {"on", "level"}
    assert isinstance(arguments["on"], bool)
    assert arguments["level"] in (1, 2, 3)


def test_tools_and_calls_are_xml_in_the_prompt(server: Server) -> None:
    call = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "So.",
        "calls": [("open", {"what": "box"})],
    }
    chat = [_of_chat(message) for message in (user("Open it"), call, {"role": "tool", "content": "done"})]
    chat[-1]["tool_call_id"] = "c"
    prompt = prompt_of(server, chat, tools=tools_for(CHAT, OPEN))
    written = "<tool_call>\n<function=open>\n<parameter=what>\nbox\n</parameter>\n</function>\n</tool_call>"
    assert f"<think>\nSo.\n</think>\n\n{written}<|im_end|>" in prompt
    assert "<tool_response>\ndone\n</tool_response>" in prompt


PICTURE = {"type": "image_url", "image_url": {"url": data_url(scene(1))}}
LATE = [user("Hi"), {"role": "system", "content": "Be brief."}]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    CHAT: ({"messages": LATE}, "System message must be at the beginning."),
    f"{CHAT} without a user": (
        {"messages": [{"role": "system", "content": "x"}]}, "No user query found in messages.",
    ),
    f"{CHAT} with a picture in the system prompt": (
        {"messages": [{"role": "system", "content": [PICTURE]}, user("Hi")]},
        "System message cannot contain images.",
    ),
    f"{CHAT} with a video in the system prompt": (
        {
            "messages": [
                {
                    "role": "system",
                    "content": [{"type": "video", "video": [data_url(scene(1)), data_url(scene(2))]}],
                },
                user("Hi"),
            ]
        },
        "System message cannot contain videos.",
    ),
    RESPONSES: ({"input": LATE}, "System message must be at the beginning."),
    f"{RESPONSES} without a user": (
        {"input": [{"role": "developer", "content": "x"}]}, "No user query found in messages.",
    ),
    MESSAGES: ({"messages": LATE, "max_tokens": 9}, "System message must be at the beginning."),
    f"{MESSAGES} without a user": (
        {"messages": [{"role": "system", "content": "x"}], "max_tokens": 9},
        "No user query found in messages.",
    ),
    f"{MESSAGES} with a picture in the system prompt": (
        {
            "system": [{"type": "image", "source": {"type": "url", "url": data_url(scene(1))}}],
            "messages": [user("Hi")],
            "max_tokens": 9,
        },
        "System message cannot contain images.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_template_refuses_is_told_in_its_words(server: Server, name: str, is_streamed: bool) -> None:
    body, words = REFUSED[name]
    response = post(server, name.partition(" ")[0], {**body, "stream": is_streamed})
    assert response.status == 400, response.body
    assert words in response.body["error"]["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_the_sampling_of_the_checkpoint_is_the_default(server: Server, path: str) -> None:
    """Its one token of `top_k` makes answers greedy."""
    plain, cold = ({}, {"temperature": 0})
    found = [ask(server, path, [user("Tell me")], **thinking(path, True), **given) for given in (plain, cold)]
    assert found[0].thought == found[1].thought
    hot = {"temperature": 1.5, "top_k": 50}
    assert ask(server, path, [user("Tell me")], **thinking(path, True), **hot).thought != found[0].thought


def test_a_response_tells_the_sampling_of_the_checkpoint(server: Server) -> None:
    answer = post(server, RESPONSES, {"input": "Hi", "max_output_tokens": 2}).body
    assert (answer["temperature"], answer["top_p"]) == (0.7, 0.9)


def test_every_end_token_of_the_three_places_ends_an_answer(server: Server, folder: Path) -> None:
    first = read_model_info(folder).image_token_id - 12
    for token, reason in ((first, "stop"), (first + 1, "stop"), (first + 2, "stop"), (first + 3, "length")):
        body = {"messages": [user("Hi")], "max_tokens": 3, "allowed_token_ids": [token]}
        answer = post(server, CHAT, body).body
        assert answer["choices"][0]["finish_reason"] == reason, token
        assert answer["usage"]["completion_tokens"] == (1 if reason == "stop" else 3)


def place_before(num_tokens: int) -> int:
    return num_tokens // WINDOW * WINDOW


@pytest.mark.parametrize("preserves", [False, True], ids=["thoughts dropped", "thoughts preserved"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_second_turn_goes_on_from_the_first(server: Server, path: str, preserves: bool) -> None:
    """Up to the turn of the model's own answer, which is all a thought; or to its end, where the template
    repeats it.

    Of sevens, which are one token each: another text need not have the tokens that a random model chose.
    """
    seven = post(server, "/tokenize", {"prompt": "7"}).body["tokens"]
    assert len(seven) == 1
    options = {"chat_template_kwargs": {"preserve_thinking": preserves, "enable_thinking": True}}
    turn = [{"role": "system", "content": f"{path} {preserves} {SYSTEM}"}, user(QUESTION)]
    first = ask(server, CHAT, turn, max_tokens=150, allowed_token_ids=seven, **options)
    assert (first.thought, first.content) == ("7" * 150, "")
    said = {"role": "assistant", "content": "", "reasoning_content": first.thought}
    second = ask(server, path, [*turn, said, user("And the other?")], **options)
    before = first.num_prompt_tokens - 4  # <|im_start|>assistant\n<think>\n
    if preserves:
        assert second.num_cached_tokens >= place_before(first.num_prompt_tokens + 150 - 1) - WINDOW
        assert second.num_cached_tokens > first.num_prompt_tokens
    else:
        assert place_before(before) - WINDOW <= second.num_cached_tokens <= first.num_prompt_tokens
        assert second.num_cached_tokens >= 2 * WINDOW


@pytest.mark.parametrize("preserves", [False, True], ids=["thoughts dropped", "thoughts preserved"])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_question_behind_calls_goes_on_where_thoughts_stay(
    server: Server, path: str, preserves: bool
) -> None:
    """A new question drops the thought before the call, so that the prompt is another from there on."""
    options = {"chat_template_kwargs": {"preserve_thinking": preserves, "enable_thinking": True}}
    called = {
        "role": "assistant",
        "content": "",
        "reasoning_content": THOUGHT,
        "calls": [("open", {"what": "box"})],
    }
    result = {"role": "tool", "tool_call_id": "c", "content": RESULT}
    answered = {"role": "assistant", "content": "Seven books.", "reasoning_content": "I count."}
    system = {"role": "system", "content": f"{path} {preserves} {SYSTEM}"}
    fields = {"tools": tools_for(path, OPEN), **options}
    asked = [system, user(QUESTION)]
    num_asked = ask(server, path, asked, max_tokens=1, **fields).num_prompt_tokens
    steps = [*asked, called, result]
    first = ask(server, path, steps, max_tokens=1, **fields)
    second = ask(server, path, [*steps, answered, user("And the lamp?")], max_tokens=1, **fields)
    assert (second.num_prompt_tokens > first.num_prompt_tokens) is preserves
    if preserves:
        assert second.num_cached_tokens >= place_before(first.num_prompt_tokens) - WINDOW > num_asked
    else:
        assert place_before(num_asked) - WINDOW <= second.num_cached_tokens <= num_asked
