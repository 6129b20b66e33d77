"""From a chat request, whichever API it was written in, to the pipeline."""

from __future__ import annotations

import msgspec

from pipeline.parsers.tool_choice import to_chat_grammar, to_tool_choice
from workers.api.chat_request import (
    ChatCompletionRequest,
    check_chat,
    to_chat_sampling,
    to_messages,
    to_template_options,
)
from workers.api.endpoints.base import ServedModel
from workers.api.media_kwargs import with_media_settings
from workers.api.submission import Submission, without_data_urls


def to_submission(request: ChatCompletionRequest, model: ServedModel, request_id: str) -> Submission:
    """Raises RequestError, naming the field, for what is not served."""
    check_chat(request)
    choice = to_tool_choice(request.tools or (), request.tool_choice, request.parallel_tool_calls)
    messages, media = without_data_urls(to_messages(request))
    chat = msgspec.structs.replace(
        with_media_settings(messages, request.mm_processor_kwargs, request.media_io_kwargs),
        tools=choice.data,
        template_options=to_template_options(request, model.forms),
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
    )
    sampling = to_chat_sampling(request, model.info.default_sampling)
    grammar = to_chat_grammar(choice, chat, model.forms, sampling.grammar)
    return Submission(
        request_id=request_id,
        prompt=chat,
        media=media,
        sampling=msgspec.structs.replace(sampling, grammar=grammar),
        priority=request.priority or 0,
        cache_salt=request.cache_salt or "",
        adapter=model.adapter,
        is_streamed=request.stream,
    )
