"""Chats with tools, calls, results and thoughts, as OpenAI's clients write them."""

from __future__ import annotations

import json
from typing import Any

from pipeline.wire.prompts import Chat, ChatMessage, ImagePart, Part, TextPart, ToolCall, VideoPart

Chatter = list[dict[str, Any]]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> in a town: é, “quoted”, 天气",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string", "description": "Its name"},
                "days": {"type": "integer", "minimum": 1},
                "parts": {"type": "array", "items": {"type": "string", "enum": ["wind", "rain"]}},
                "exact": {"type": "boolean"},
            },
            "required": ["town"],
        },
    },
}
LOOK: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
BARE: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, LOOK, BARE]
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def user(*content: Any) -> dict[str, Any]:
    """One text is a string, else a list of parts."""
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": "user", "content": content[0]}
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return {"role": "user", "content": parts}


def said(content: str | None = None, *calls: tuple[str, Any], thought: str | None = None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls)
        ]
    if thought is not None:
        message["reasoning_content"] = thought
    return message


def result(*content: Any, number: int = 0) -> dict[str, Any]:
    return {**user(*content), "role": "tool", "tool_call_id": f"call_{number}"}


SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = user('Hello <you> & "you" 你好 🙂')
CALL = ("weather", {"town": "Köln", "days": 2, "parts": ["wind", "rain"], "exact": True})
SEE = ("look", {"at": {"x": 1.5, "y": None}, "code": "if a < b:\n\tprint('}')"})
HISTORY = [HELLO, said("I look.", CALL), result('{"wind": 3}')]
TOOL_CHATS: dict[str, Chatter] = {
    "one question": [HELLO],
    "a system prompt": [SYSTEM, HELLO],
    "two turns": [HELLO, said("Hi!"), user("And now?")],
    "a call": HISTORY,
    "a call without content": [HELLO, said(None, CALL), result("sunny")],
    "a call with empty content": [HELLO, said("", SEE), result("sunny")],
    "two calls in a turn": [HELLO, said("Both.", CALL, SEE), result("a"), result("b", number=1)],
    "a call of nothing": [HELLO, said(None, ("now", {})), result("12:00")],
    "arguments that are no object": [HELLO, said(None, ("now", "not json {")), result("12:00")],
    "a call and an answer": [*HISTORY, said("It is windy."), user("Why?")],
    "calls in two steps": [HELLO, said("1", CALL), result("a"), said("2", SEE), result("b")],
    "a thought": [HELLO, said("Hi!", thought="They greet me.\n\nI greet them."), user("Why?")],
    "an empty thought": [HELLO, said("Hi!", thought=""), user("Why?")],
    "a thought before a call": [HELLO, said("", CALL, thought="I need it."), result("a")],
    "a thought in the content": [HELLO, said("<think>\nSo?\n</think>\n\nHi!", CALL), result("a")],
    "thoughts of two turns": [
        HELLO,
        said("Hi!", thought="First."),
        user("Go on"),
        said("", CALL, thought="Second."),
        result("a"),
        said("", SEE, thought="Third."),
        result("b"),
    ],
    "a result in a user's message": [HELLO, said("x"), user("<tool_response>\n5\n</tool_response>")],
    "tags in a user's message": [user("What do <think>, </think> and <tool_call>{}</tool_call> mean?")],
    "a result with tags": [HELLO, said("", CALL), result("<tool_call>\n</think> <tools>")],
    "blanks around": [user("  hi \n"), said("\n\nHi there \n"), user("\n\nbye\n")],
}
# Not for templates that take no pictures.
SEEN_CHATS: dict[str, Chatter] = {
    "a picture": [user(IMAGE, "What is it?")],
    "a picture and a video": [
        user("See", IMAGE, "and", VIDEO, "Which?"),
        said("This."),
        user(IMAGE, "Or it?"),
    ],
    "a picture in a result": [user(IMAGE, "Zoom in"), said("", SEE), result("here", IMAGE, "it is")],
    "pictures in two results": [
        user("Look", IMAGE),
        said("Both", SEE, SEE),
        result(IMAGE),
        result("x", IMAGE, VIDEO, number=1),
        said("", SEE, thought="Again."),
        result(IMAGE),
    ],
}


def to_chat(messages: Chatter, tools: list[dict[str, Any]] | None = None, **options: Any) -> Chat:
    """As the pipeline's own."""
    data = json.dumps(tools).encode() if tools else b""
    return Chat(tuple(map(_message, messages)), data, **options)


def _message(message: dict[str, Any]) -> ChatMessage:
    calls = [
        ToolCall(call["id"], call["function"]["name"], _text(call["function"]["arguments"]))
        for call in message.get("tool_calls", ())
    ]
    content = message["content"]
    return ChatMessage(
        message["role"],
        (content or "") if not isinstance(content, list) else tuple(map(_part, content)),
        tool_calls=tuple(calls),
        tool_call_id=message.get("tool_call_id", ""),
        reasoning=message.get("reasoning_content"),
    )


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _part(part: dict[str, Any]) -> Part:
    if part["type"] == "text":
        return TextPart(part["text"])
    return ImagePart(frame=0) if part["type"] == "image" else VideoPart(frame=0)
