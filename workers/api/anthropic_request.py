"""The fields of Anthropic's Messages API, and their conversion to a chat request of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pipeline.parsers.forms import THINKING, ChatForms
from pipeline.wire.errors import RequestError, shown
from workers.api.chat_request import ChatCompletionRequest, RequestCall, RequestFunction, RequestMessage
from workers.api.json_bodies import is_unset
from workers.api.keys import refuse_unserved_keys, text_of
from workers.api.parts import check_pieces

Json = dict[str, Any]
IGNORED_IN_BLOCK = ("type", "cache_control", "citations", "signature", "title", "context", "caller")
IGNORED_IN_TOOL = ("type", "cache_control", "eager_input_streaming")  # how it is billed and sent


class AnthropicMessage(msgspec.Struct):
    role: str
    content: str | list[Json]


class MessagesFields(msgspec.Struct, kw_only=True):
    """What a prompt is made of."""

    model: str = ""
    messages: list[AnthropicMessage]
    system: str | list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None
    thinking: Json | None = None
    output_config: Json | None = None  # effort, and the form of the answer
    output_format: Json | None = None  # the same, by its older name
    chat_template_kwargs: Json | None = None  # no field of Anthropic's: as in a chat


class MessagesRequest(MessagesFields, kw_only=True):
    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    # These do not change the answer, and are ignored.
    metadata: Json | None = None
    service_tier: str | None = None
    inference_geo: str | None = None


def to_chat_request(request: MessagesFields, forms: ChatForms) -> ChatCompletionRequest:
    """Raises RequestError, naming the field, for what is not served."""
    _check_blocks(request)
    messages = [] if request.system is None else [_system(request.system)]
    for index, message in enumerate(request.messages):
        messages += _messages(message, f"messages[{index}]")
    chat = ChatCompletionRequest(messages=messages, model=request.model)
    if request.messages and request.messages[-1].role == "assistant":  # the model goes on writing it
        chat.continue_final_message, chat.add_generation_prompt = True, False
    chat.tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    chat.chat_template_kwargs = request.chat_template_kwargs
    _take_tool_choice(request.tool_choice, chat)
    _take_thinking(request.thinking, forms, chat)
    _take_output(request, chat)
    if isinstance(request, MessagesRequest):
        chat.max_tokens, chat.stream, chat.stop = request.max_tokens, request.stream, request.stop_sequences
        chat.temperature, chat.top_k, chat.top_p = request.temperature, request.top_k, request.top_p  # type: ignore[attr-defined]
    return chat


def _check_blocks(request: MessagesFields) -> None:
    """Counts blocks, and those of results, before anything walks over them. Raises RequestError."""
    check_pieces([request.system], "system")
    contents = [message.content for message in request.messages]
    check_pieces(contents, "messages")
    blocks = [block for content in contents if not isinstance(content, str) for block in content]
    check_pieces([block.get("content") for block in blocks], "messages")


def _system(given: str | list[Json]) -> RequestMessage:
    if isinstance(given, str):
        return RequestMessage("system", given)
    parts = [_part(block, f"system[{index}]") for index, block in enumerate(given)]
    return RequestMessage("system", parts)


def _messages(message: AnthropicMessage, field: str) -> list[RequestMessage]:
    """A message of the chat; before it, one for each result of a call."""
    if message.role not in ("user", "assistant", "system"):
        what = f"unknown role {shown(message.role)}; known are user and assistant"
        raise RequestError(what, field=f"{field}.role")
    if isinstance(message.content, str):
        return [RequestMessage(message.role, message.content)]
    parts: list[Json] = []
    calls: list[RequestCall] = []
    thoughts: list[str] = []
    results: list[RequestMessage] = []
    for index, block in enumerate(message.content):
        place = f"{field}.content[{index}]"
        match block.get("type"):
            case "tool_result":
                results.append(_result(block, place))
            case "tool_use":
                calls.append(_call(block, place))
            case "thinking":
                thoughts.append(text_of(block, "thinking", place))
            case "redacted_thinking":
                pass  # of another model: it says nothing to this one
            case _:
                parts.append(_part(block, place))
    made = list(results)
    if parts or calls or thoughts or not results:
        reasoning = "".join(thoughts) or None
        content = _text_or_parts(parts) if message.role == "assistant" else parts
        made.append(
            RequestMessage(message.role, content, tool_calls=calls or None, reasoning_content=reasoning)
        )
    return made


def _text_or_parts(parts: Sequence[Json]) -> str | list[Json]:
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return list(parts)


def _call(block: Json, field: str) -> RequestCall:
    arguments = block.get("input") or {}
    if not isinstance(arguments, dict):
        raise RequestError(
            f"the input of a call must be an object, got {shown(arguments)}", field=f"{field}.input"
        )
    return RequestCall(RequestFunction(text_of(block, "name", field), arguments), text_of(block, "id", field))


def _result(block: Json, field: str) -> RequestMessage:
    content = block.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{field}.content[{index}]") for index, part in enumerate(content)]
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"a result is a text or blocks, got {shown(content)}", field=f"{field}.content")
    _refuse_others(block, ("tool_use_id", "content", "is_error"), field)
    return RequestMessage("tool", content, tool_call_id=text_of(block, "tool_use_id", field))


def _part(block: Any, field: str) -> Json:
    """A part as OpenAI's clients write it."""
    match block.get("type") if isinstance(block, dict) else None:
        case "text":
            _refuse_others(block, ("text",), field)
            return {"type": "text", "text": text_of(block, "text", field)}
        case "image":
            _refuse_others(block, ("source",), field)
            return {"type": "image_url", "image_url": {"url": _url(block.get("source"), f"{field}.source")}}
        case "document":
            _refuse_others(block, ("source",), field)
            return {"type": "text", "text": _document(block.get("source"), f"{field}.source")}
        case kind:
            what = f"{shown(kind)} is no type of a block here; served are text, image, document (of text), "
            what += "tool_use, tool_result and thinking"
            raise RequestError(what, field=f"{field}.type")


def _url(source: Any, field: str) -> str:
    match source:
        case {"type": "base64", "data": str(data), "media_type": str(media_type)}:
            return f"data:{media_type};base64,{data}"
        case {"type": "url", "url": str(url)}:
            return url
    raise RequestError("the source of a picture is base64 or a url", field=field)


def _document(source: Any, field: str) -> str:
    match source:
        case {"type": "text", "data": str(text)}:
            return text
        case {"type": "content", "content": str(text)}:
            return text
    raise RequestError("of documents only plain text is served", field=field)


def _refuse_others(given: Mapping[str, Any], served: Sequence[str], field: str) -> None:
    refuse_unserved_keys(given, served, IGNORED_IN_BLOCK, "a block", field)


def _tool(tool: Json, field: str) -> Json:
    if tool.get("type") not in (None, "custom"):
        what = f"of tools only a client's own are served, got the type {shown(tool['type'])}"
        raise RequestError(what, field=f"{field}.type")
    served = ("name", "description", "input_schema", "strict")
    refuse_unserved_keys(tool, served, IGNORED_IN_TOOL, "a tool", field)
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema") or {"type": "object"}}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _take_tool_choice(given: Json | None, chat: ChatCompletionRequest) -> None:
    match given:
        case None | {"type": "auto"}:
            pass
        case {"type": "any"}:
            chat.tool_choice = "required"
        case {"type": "none"}:
            chat.tool_choice = "none"
        case {"type": "tool", "name": str(name)}:
            chat.tool_choice = {"type": "function", "function": {"name": name}}
        case _:
            what = f"tool_choice must be auto, any, none or a tool, got {shown(given)}"
            raise RequestError(what, field="tool_choice")
    chat.parallel_tool_calls = not (given or {}).get("disable_parallel_tool_use")


def _take_thinking(given: Json | None, forms: ChatForms, chat: ChatCompletionRequest) -> None:
    """As Anthropic's models, none thinks unasked, where its template has the choice. The template's own
    option wins, unless it is null."""
    given = {"type": "disabled"} if given is None else given
    kind = given.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        what = f"thinking.type must be enabled, disabled or adaptive, got {shown(kind)}"
        raise RequestError(what, field="thinking.type")
    options = chat.chat_template_kwargs or {}
    if forms.knows(THINKING) and options.get(THINKING) is None:
        chat.chat_template_kwargs = {**options, THINKING: kind != "disabled"}
    budget = given.get("budget_tokens")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        what = f"thinking.budget_tokens must be a number of tokens, got {shown(budget)}"
        raise RequestError(what, field="thinking.budget_tokens")
    if kind == "enabled":
        chat.thinking_token_budget = budget


def _take_output(request: MessagesFields, chat: ChatCompletionRequest) -> None:
    config = request.output_config or {}
    for name in config:
        if name not in ("effort", "format") and not is_unset(config[name]):
            field = f"output_config.{name}"
            raise RequestError(f"{field} is not served by this server", field=field)
    chat.reasoning_effort = config.get("effort")
    form = config.get("format") or request.output_format
    if form is None:
        return
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        what = f"the format of an answer must be a json_schema, got {shown(form)}"
        raise RequestError(what, field="output_config.format")
    chat.response_format = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": form.get("schema")},
    }


def to_call_input(arguments: str) -> Json:
    """A call's arguments as an object; a model's text that is none stands under one key."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"arguments": arguments}
