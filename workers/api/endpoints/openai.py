"""Response objects that several of OpenAI's endpoints share."""

from __future__ import annotations

from collections.abc import Sequence

from workers.api.answer import PromptAnswer, ScoredToken, TokenScores, Usage
from workers.api.endpoints.base import Json

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this


def usage_object(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.num_prompt_tokens, "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": _prompt_details(usage),
        "completion_tokens_details": {"reasoning_tokens": usage.num_thought_tokens},
    }  # fmt: skip


def _prompt_details(usage: Usage) -> Json:
    """OpenAI's, and for a prompt with pictures or videos where their embeddings came from."""
    details: Json = {"cached_tokens": usage.num_cached_tokens}
    if usage.media is not None:
        details["media_tokens"] = usage.media._asdict()
    return details


def prompt_logprobs(prompt: PromptAnswer) -> list[Json | None]:
    """vLLM's form: for each prompt token an object by token id; null for the first token."""
    found: list[Json | None] = [None]
    for token in prompt.scores:
        ranked = [(token.chosen, token.rank), *((one, rank) for rank, one in enumerate(token.best, 1))]
        found.append(
            {
                str(one.token_id): {
                    "logprob": max(one.logprob, LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": one.text.decode(errors="replace"),
                }
                for one, rank in ranked
            }
        )
    return found


def logprob_objects(tokens: Sequence[TokenScores]) -> list[Json]:
    """OpenAI's entries, one for each token."""
    return [{**_entry(token.chosen), "top_logprobs": [_entry(one) for one in token.best]} for token in tokens]


def _entry(token: ScoredToken) -> Json:
    return {
        "token": token.text.decode(errors="replace"),
        "logprob": max(token.logprob, LEAST_LOGPROB),
        "bytes": list(token.text),
    }
