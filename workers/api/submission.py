"""What a request asks of the pipeline, whichever endpoint it came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.client.data_urls import move_data_urls
from pipeline.wire.prompts import Chat, ChatMessage, Prompt
from pipeline.wire.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    request_id: str
    prompt: Prompt  # names the media by their number
    sampling: SamplingParams
    media: Sequence[memoryview] = ()
    priority: int = 0  # a lower one goes first
    cache_salt: str = ""  # as the client gave it
    is_streamed: bool = False


class Conversation(NamedTuple):
    chat: Chat
    media: Sequence[memoryview]


def without_data_urls(messages: Sequence[ChatMessage]) -> Conversation:
    """The same, its media decoded: once, however many choices there are, and the body may go.

    Raises RequestError for a `data:` URL that is none.
    """
    frames: list[bytes | memoryview] = []
    moved = move_data_urls(messages, frames)
    return Conversation(Chat(moved), [memoryview(frame) for frame in frames])
