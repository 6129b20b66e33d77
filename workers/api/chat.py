"""From a decoded body to a completion: what the HTTP endpoint and the offline batches have in common."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import NamedTuple

from pipeline.client.client import Piece, PipelineClient
from pipeline.client.data_urls import move_data_urls
from pipeline.families import ModelInfo
from pipeline.wire.errors import RequestError, shown
from workers.api.protocol import (
    ChatCompletionRequest,
    refuse_unserved,
    to_messages,
    to_sampling,
)
from workers.api.stream import Completion


class Chat(NamedTuple):
    completion: Completion
    pieces: AsyncGenerator[Piece, None]  # of all choices; nothing is submitted before they are read
    media: list[memoryview]  # that came with the body
    is_streamed: bool
    include_usage: bool


def open_chat(
    client: PipelineClient,
    body: ChatCompletionRequest,
    model_name: str,
    info: ModelInfo,
    cache_salt: bytes = b"",
    tenant: str = "",
) -> Chat:
    """Raises RequestError for what is not served. `body` is not needed any more: its media are in `media`."""
    refuse_unserved(body)
    if body.model and body.model != model_name:
        what = f"the model {shown(body.model)} is not served here, only {model_name!r}"
        raise RequestError(what, field="model", status=404)
    messages, sampling = to_messages(body), to_sampling(body, dict(info.default_sampling))
    completion_id = f"chatcmpl-{uuid.uuid4().hex}"
    frames: list[bytes | memoryview] = []
    moved = move_data_urls(messages, frames)
    media = [memoryview(frame) for frame in frames]
    pieces = client.generate(
        moved,
        sampling,
        media,
        request_id=completion_id,
        priority=body.priority or 0,
        cache_salt=cache_salt,
        tenant=tenant,
    )
    completion = Completion(completion_id, model_name, sampling.n, bool(body.logprobs), client.token_text)
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return Chat(completion, pieces, media, body.stream, include_usage)
