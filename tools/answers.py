"""Which answers may be given to a request. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tools.mutations import HEAD_CHANGES, Mutated
from tools.valid_requests import (
    CHAT,
    COMPLETIONS,
    COUNT,
    DETOKENIZE,
    MESSAGES,
    RENDER,
    RESPONSES,
    TOKENIZE,
)

Json = dict[str, Any]
# What a whole answer must have.
KEYS: Mapping[str, str] = {
    CHAT: "choices", COMPLETIONS: "choices", RESPONSES: "output", MESSAGES: "content",
    COUNT: "input_tokens", TOKENIZE: "tokens", DETOKENIZE: "prompt", RENDER: "prompt_token_ids",
}  # fmt: skip
# The `object` of each event of a stream that ends with a mark.
OBJECTS = {CHAT: "chat.completion.chunk", COMPLETIONS: "text_completion"}
# The last event of a stream whose events have types.
LAST = {RESPONSES: ("response.completed", "response.incomplete"), MESSAGES: ("message_stop",)}
ANTHROPIC = (MESSAGES, COUNT)


class Answer(NamedTuple):
    status: int  # 0: none
    body: bytes
    is_stream: bool
    seconds: float
    lost: str = ""  # how the connection ended before the answer did


def wrong_answer(status: int, answer: bytes, path: str = CHAT) -> str:
    """What a status should not have been, or an error's body not have said."""
    if status < 400:
        return ""
    is_error = _is_anthropic_error if path in ANTHROPIC else _is_error
    if not is_error(answer):
        return f"status {status} without the error object of {path} ({answer[:100]!r})"
    return f"status {status}" if status >= 500 and status != 503 else ""


def _is_error(answer: bytes) -> bool:
    """OpenAI's object."""
    try:
        error = json.loads(answer)["error"]
        return isinstance(error["message"], str) and {"type", "param", "code"} <= error.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_anthropic_error(answer: bytes) -> bool:
    try:
        told = json.loads(answer)
        error = told["error"]
        return (
            told["type"] == "error" and isinstance(error["message"], str) and isinstance(error["type"], str)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def violation(sent: Mutated, answer: Answer) -> str:
    """Empty if the answer is one that may be given to what was sent."""
    if answer.lost:
        return answer.lost if sent.is_framed or answer.status or "timed out" in answer.lost else ""
    if answer.status == 200 and not sent.path:
        return ""
    if answer.status == 200:
        try:
            return (
                _wrong_stream(answer.body, sent.path) if answer.is_stream else _wrong_whole(answer.body, sent)
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"status 200, {type(error).__name__} in {answer.body[:100]!r}"
    if answer.status < 400:
        return f"status {answer.status}"
    if not sent.what and answer.status not in (429, 503):
        return f"a valid request was refused: {answer.status} {answer.body[:200]!r}"
    if HEAD_CHANGES & {*sent.what}:  # what is no HTTP has no route, and another path may be Anthropic's
        return min(wrong_answer(answer.status, answer.body, path) for path in (CHAT, MESSAGES))
    return wrong_answer(answer.status, answer.body, sent.path)


def _wrong_whole(body: bytes, sent: Mutated) -> str:
    key = KEYS.get(sent.path)
    if key is None:
        return ""
    value = json.loads(body)[key]
    return "" if value or key not in ("choices", "output", "content") else f"no {key}"


def _wrong_stream(body: bytes, path: str) -> str:
    """Events that do not parse, an end without its mark, an error that no client may see."""
    *events, rest = body.decode().split("\n\n")
    if rest or not events:
        return f"the stream is cut: {body[-100:]!r}"
    if path in LAST:
        return _wrong_typed_stream(events, path)
    if events[-1] != "data: [DONE]":
        return f"the stream does not end with [DONE] but with {body[-100:]!r}"
    for event in events[:-1]:
        given = json.loads(event.removeprefix("data: "))
        if "error" in given:
            return wrong_answer(_status_of(given["error"]), event.removeprefix("data: ").encode())
        if given["object"] != OBJECTS[path]:
            return f"a strange event: {event[:100]}"
    return ""


def _wrong_typed_stream(events: Sequence[str], path: str) -> str:
    for event in events:
        name, _, data = event.partition("\ndata: ")
        given = json.loads(data)
        if name != f"event: {given['type']}":
            return f"a strange event: {event[:100]}"
    if given["type"] == "error":
        kind = given.get("error", {}).get("type") or given.get("code")
        return f"the stream ends with {data[:100]}" if kind in ("api_error", "server_error") else ""
    return "" if given["type"] in LAST[path] else f"the stream does not end but with {events[-1][:100]}"


def _status_of(error: Json) -> int:
    """What the status would be if the stream had not begun."""
    if error.get("type") != "server_error":
        return 400
    return 503 if error.get("code") == "service_unavailable" else 500
