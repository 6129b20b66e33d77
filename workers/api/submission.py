"""A request to the pipeline, independent of the endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.client.data_urls import move_data_urls
from pipeline.wire.prompts import Chat, ChatMessage, Prompt
from pipeline.wire.sampling import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One request to the pipeline, or one for each of several prompts."""

    request_id: str
    prompt: Prompt  # names the media by their index
    sampling: SamplingParams
    media: Sequence[memoryview] = ()
    priority: int = 0  # lower goes first
    cache_salt: str = ""  # as the client gave it
    adapter: str = ""
    is_streamed: bool = False
    further_prompts: Sequence[Prompt] = ()  # of text: they are answered as `prompt` is

    @property
    def prompts(self) -> Sequence[Prompt]:
        return (self.prompt, *self.further_prompts)

    def id_of(self, number: int) -> str:
        """The id of the request for one of the prompts."""
        return f"{self.request_id}-{number}" if self.further_prompts else self.request_id


def for_its_prompt(submission: Submission, max_model_len: int) -> Submission:
    """The same prompt, of which only the token ids are asked for."""
    kept = submission.sampling.num_kept_of_prompt(max_model_len)
    sampling = SamplingParams(max_tokens=0, truncate_prompt_tokens=kept)
    return dataclasses.replace(submission, sampling=sampling, is_streamed=False)


class Conversation(NamedTuple):
    chat: Chat
    media: Sequence[memoryview]


def without_data_urls(messages: Sequence[ChatMessage]) -> Conversation:
    """The messages, with the data of their `data:` URLs moved to `media`: once for all choices, and so that
    the body can be freed.

    Raises RequestError for an invalid `data:` URL.
    """
    frames: list[bytes | memoryview] = []
    moved = move_data_urls(messages, frames)
    return Conversation(Chat(moved), [memoryview(frame) for frame in frames])
