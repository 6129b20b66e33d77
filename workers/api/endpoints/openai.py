"""Response objects that several of OpenAI's endpoints share."""

from __future__ import annotations

from workers.api.answer import Usage
from workers.api.endpoints.base import Json


def usage_object(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.num_prompt_tokens, "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }  # fmt: skip
