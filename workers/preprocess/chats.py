"""The messages and tools of a chat in the form in which chat templates take them: transformers' own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, assert_never

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.prompts import (
    ROLES,
    SAME_ROLES,
    Chat,
    ChatMessage,
    ImagePart,
    Part,
    TextPart,
    ToolCall,
    VideoPart,
)


def template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    """Raises RequestError for an unknown role."""
    role = SAME_ROLES.get(message.role, message.role)
    if role not in ROLES:
        what = f"unknown role {shown(message.role)}; known are {', '.join((*ROLES, *SAME_ROLES))}"
        raise RequestError(what, field=f"messages[{index}].role")
    given: dict[str, Any] = {"role": role, "content": _content(message.content)}
    if message.reasoning is not None:
        # transformers gives reasoning by all the names that templates have for it.
        given |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
    if message.tool_calls:
        given["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            given[name] = value
    return given


def _content(content: str | tuple[Part, ...]) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    parts = [_template_part(part) for part in content]
    if all("text" in part for part in parts):
        # Some templates take lists of parts not for every role; without pictures the parts are one text.
        return "".join(part["text"] for part in parts)
    return parts


def _template_part(part: Part) -> dict[str, str]:
    match part:
        case TextPart():
            return {"type": "text", "text": part.text}
        case ImagePart():
            return {"type": "image"}
        case VideoPart():
            return {"type": "video"}
        case _:
            assert_never(part)


def _template_call(call: ToolCall) -> dict[str, Any]:
    arguments: Any = call.arguments
    try:
        parsed = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        arguments = parsed
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


def parts_of(messages: Sequence[ChatMessage]) -> list[Part]:
    return [part for message in messages if not isinstance(message.content, str) for part in message.content]


def texts_of(message: ChatMessage) -> list[str]:
    """All texts of a message."""
    if isinstance(message.content, str):
        texts = [message.content]
    else:
        texts = [part.text for part in message.content if isinstance(part, TextPart)]
    for call in message.tool_calls:
        texts += (call.id, call.name, call.arguments)
    return [*texts, message.tool_call_id, message.name, message.reasoning or ""]


def num_characters(chat: Chat) -> int:
    return len(chat.tools) + sum(len(text) for message in chat.messages for text in texts_of(message))
