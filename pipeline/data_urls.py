"""`data:` URLs of a chat become frames of their own, so that large media are neither scanned nor copied as text on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from pipeline.errors import RequestError
from pipeline.messages import ChatMessage, ImagePart, Part, TextPart, VideoPart

M = TypeVar("M", ImagePart, VideoPart)


def move_data_urls(messages: Sequence[ChatMessage], frames: list[bytes | memoryview]) -> tuple[ChatMessage, ...]:
    """The messages without their data, which is put behind `frames`. Raises RequestError for a URL that is none."""
    return tuple(_move_data_urls(message, frames) for message in messages)


def _move_data_urls(message: ChatMessage, frames: list[bytes | memoryview]) -> ChatMessage:
    if isinstance(message.content, str):
        return message
    parts: list[Part] = []
    for part in message.content:
        if isinstance(part, VideoPart) and part.frames:
            parts.append(msgspec.structs.replace(part, frames=tuple(_move_data_url(frame, frames) for frame in part.frames)))
        elif isinstance(part, VideoPart):
            parts.append(_move_data_url(part, frames))
        else:
            parts.append(part if isinstance(part, TextPart) else _move_data_url(part, frames))
    return ChatMessage(message.role, tuple(parts))


def _move_data_url(part: M, frames: list[bytes | memoryview]) -> M:
    if part.url[:5].lower() != "data:":
        return part
    header, comma, payload = part.url.partition(",")
    if not comma:
        raise RequestError("a data: URL has a comma before its data", field="messages")
    is_base64 = header.lower().endswith(";base64")
    frames.append(payload.encode("utf-8", "surrogatepass") if is_base64 else unquote_to_bytes(payload))
    return msgspec.structs.replace(part, url="", frame=len(frames) - 1, is_base64=is_base64)
