"""The fields of OpenAI's Responses API, and their conversion to a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.wire.errors import RequestError, shown
from workers.api.chat_request import ChatCompletionRequest, RequestCall, RequestFunction, RequestMessage
from workers.api.json_bodies import is_unset
from workers.api.keys import refuse_unserved_keys, text_of
from workers.api.parts import check_pieces
from workers.api.sampling_fields import SamplingFields, check_max_tokens

Json = dict[str, Any]
ROLES = ("user", "assistant", "system", "developer")
# Keys of items that say nothing to the model; `parsed` is what OpenAI's client made of the text.
IGNORED = ("id", "status", "type", "annotations", "logprobs", "phase", "created_by", "parsed")
# Fields of the API whose other values would change the answer.
NEUTRAL: Mapping[str, Sequence[object]] = {
    "background": (False,),
    "conversation": (),
    "prompt": (),
    "truncation": ("disabled",),
    "context_management": (),
    "max_tool_calls": (),
    # vLLM's, for which a response has no place
    "prompt_logprobs": (),
    "return_token_ids": (False,),
}


class ResponsesRequest(SamplingFields, kw_only=True):
    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    tools: list[Json] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: Json | None = None
    reasoning: Json | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    chat_template_kwargs: Json | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Json | None = None
    truncation: str | None = None
    context_management: list[Any] | None = None
    max_tool_calls: int | None = None


def check_responses(request: ResponsesRequest) -> None:
    """Raises RequestError, naming the field, for what is not served and would change the answer."""
    for name, neutral in NEUTRAL.items():
        value = getattr(request, name)
        if not is_unset(value) and value not in neutral:
            raise RequestError(f"{name} is not served by this server, got {shown(value)}", field=name)
    if request.n not in (None, 1):
        raise RequestError("a response has one choice", field="n")
    check_max_tokens(request.max_output_tokens, "max_output_tokens")
    if request.response_format is not None and (request.text or {}).get("format") is not None:
        raise RequestError("only one of text.format and response_format can be given", field="text.format")


def to_items(given: str | list[Json]) -> list[Json]:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def check_items(items: Sequence[Any]) -> None:
    """Counts items and their parts, before anything walks over them. Raises RequestError."""
    objects = [item for item in items if isinstance(item, dict)]
    check_pieces(items, "input")
    for name in ("content", "output", "summary"):
        check_pieces([item.get(name) for item in objects], "input")


def reference_of(item: object) -> str | None:
    """The id of the stored item for which this one stands, or None: it stands for itself."""
    match item:
        case {"type": "item_reference", "id": str(item_id)}:
            return item_id
        case {"id": str(item_id), **rest} if all(is_unset(value) for value in rest.values()):
            return item_id
        case _:
            return None


def to_chat_request(request: ResponsesRequest, items: Sequence[Json]) -> ChatCompletionRequest:
    """`items`: the whole conversation. Raises RequestError, naming the field, for what is not served."""
    messages = [] if request.instructions is None else [RequestMessage("system", request.instructions)]
    messages += to_messages(items)
    chat = ChatCompletionRequest(messages=messages)
    for name in SamplingFields.__struct_fields__:
        setattr(chat, name, getattr(request, name))
    chat.max_completion_tokens = request.max_output_tokens
    if "message.output_text.logprobs" in (request.include or ()) or request.top_logprobs:
        chat.logprobs, chat.top_logprobs = True, request.top_logprobs
    chat.tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    chat.tool_choice, chat.parallel_tool_calls = (
        _tool_choice(request.tool_choice),
        request.parallel_tool_calls,
    )
    chat.chat_template_kwargs = request.chat_template_kwargs
    chat.reasoning = request.reasoning
    form = (request.text or {}).get("format")
    if form is not None:
        chat.response_format = _response_format(form)
    return chat


def to_messages(items: Sequence[Json]) -> list[RequestMessage]:
    """Items of an assistant's turn, one after another, are one message."""
    turns: list[list[RequestMessage]] = []
    turn = Turn()
    for index, item in enumerate(items):
        made = _message(item, f"input[{index}]")
        if made is None:
            continue
        if not turns or not turn.takes(made):
            turn = Turn()
            turns.append([])
        turn.add(made)
        turns[-1].append(made)
    return [one[0] if len(one) == 1 else _joined(one) for one in turns]


class Turn:
    """What the message has so far that further items may join. Thoughts come before texts, and texts before
    calls."""

    def __init__(self) -> None:
        self._is_assistant = self._has_content = self._has_calls = False

    def takes(self, new: RequestMessage) -> bool:
        if not self._is_assistant or new.role != "assistant":
            return False
        is_only_calls = not new.content and not new.reasoning_content
        return is_only_calls or not (self._has_content or self._has_calls)

    def add(self, new: RequestMessage) -> None:
        self._is_assistant = new.role == "assistant"
        self._has_content |= bool(new.content)
        self._has_calls |= bool(new.tool_calls)


def _message(item: Any, field: str) -> RequestMessage | None:
    """None for an item that says nothing to the model."""
    if not isinstance(item, dict):
        raise RequestError(f"an item of the input must be an object, got {shown(item)}", field=field)
    match item.get("type"):
        case None | "message":
            return _plain_message(item, field)
        case "function_call":
            _refuse_others(item, ("call_id", "name", "arguments"), field)
            name, arguments = text_of(item, "name", field), text_of(item, "arguments", field)
            call = RequestCall(RequestFunction(name, arguments), text_of(item, "call_id", field))
            return RequestMessage("assistant", None, tool_calls=[call])
        case "function_call_output":
            _refuse_others(item, ("call_id", "output"), field)
            output = item.get("output")
            content = output if isinstance(output, str) else _parts(output, f"{field}.output")
            return RequestMessage("tool", content, tool_call_id=text_of(item, "call_id", field))
        case "reasoning":
            thoughts = _thoughts(item, field)
            return RequestMessage("assistant", None, reasoning_content=thoughts) if thoughts else None
        case kind:
            served = "message, function_call, function_call_output, reasoning and item_reference"
            what = f"{shown(kind)} is no type of an item here; served are {served}"
            raise RequestError(what, field=f"{field}.type")


def _thoughts(item: Json, field: str) -> str:
    name = "summary" if is_unset(item.get("content")) else "content"
    parts = item.get(name)
    if is_unset(parts):
        return ""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise RequestError(f"{name} must be a list of parts, got {shown(parts)}", field=f"{field}.{name}")
    places = ((part, f"{field}.{name}[{index}]") for index, part in enumerate(parts))
    return "".join(text_of(part, "text", place) for part, place in places if not is_unset(part.get("text")))


def _plain_message(item: Json, field: str) -> RequestMessage:
    _refuse_others(item, ("role", "content"), field)
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        what = f"unknown role {shown(role)}; known are {', '.join(ROLES)}"
        raise RequestError(what, field=f"{field}.role")
    if isinstance(content, str):
        return RequestMessage(role, content)
    parts = _parts(content, f"{field}.content")
    texts = [part.get("text") for part in parts if part.get("type") == "text"]
    words = [text for text in texts if isinstance(text, str)]
    if role == "assistant" and len(words) == len(parts):
        return RequestMessage(role, "".join(words))
    return RequestMessage(role, parts)


def _parts(given: Any, field: str) -> list[Json]:
    if not isinstance(given, list):
        raise RequestError(f"the content must be a text or a list of parts, got {shown(given)}", field=field)
    return [_part(part, f"{field}[{index}]") for index, part in enumerate(given)]


def _part(part: Any, field: str) -> Json:
    """A part as the chat's clients write it. What is no part of this API may be one of a chat."""
    if not isinstance(part, dict):
        raise RequestError(f"a part must be an object, got {shown(part)}", field=field)
    match part.get("type"):
        case "input_text" | "output_text":
            _refuse_others(part, ("text",), field)
            return {"type": "text", "text": text_of(part, "text", field)}
        case "refusal":
            return {"type": "text", "text": text_of(part, "refusal", field)}
        case "input_image":
            if not is_unset(part.get("file_id")):
                raise RequestError("files are not stored by this server", field=f"{field}.file_id")
            rest = {key: value for key, value in part.items() if key not in ("file_id", "image_url")}
            url = part.get("image_url")
            if not is_unset(url) and not isinstance(url, dict):
                url = {"url": text_of(part, "image_url", field)}
            return {**rest, "type": "image_url", "image_url": url}
        case _:
            return part


def _joined(turn: Sequence[RequestMessage]) -> RequestMessage:
    """In one step: a turn may have as many items as a body has room for."""
    return RequestMessage(
        "assistant",
        next((one.content for one in turn if one.content), turn[0].content),
        tool_calls=[call for one in turn for call in one.tool_calls or ()] or None,
        reasoning_content="".join(one.reasoning_content or "" for one in turn) or None,
    )


def _tool(tool: Any, field: str) -> Json:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        what = f"of tools only a client's own functions are served, got {shown(kind)}"
        raise RequestError(what, field=f"{field}.type")
    if isinstance(tool.get("function"), dict):  # as in a chat
        return tool
    names = ("name", "description", "parameters", "strict")
    refuse_unserved_keys(tool, names, ("type",), "a tool", field)
    return {"type": "function", "function": {key: tool[key] for key in names if tool.get(key) is not None}}


def _tool_choice(given: Any) -> Any:
    match given:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "tools": list(tools)}:
            return {**given, "tools": [_tool_choice(tool) for tool in tools]}
        case _:
            return given


def _response_format(given: Any) -> Json:
    match given:
        case {"type": "json_schema"}:
            named = {key: given[key] for key in ("name", "schema", "strict") if key in given}
            return {"type": "json_schema", "json_schema": named}
        case {"type": str()}:
            return dict(given)
    raise RequestError(f"text.format must be an object with a type, got {shown(given)}", field="text.format")


def _refuse_others(given: Mapping[str, Any], served: Sequence[str], field: str) -> None:
    refuse_unserved_keys(given, served, IGNORED, "an item", field)
