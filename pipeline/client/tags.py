"""The tags of calls and thoughts among a tokenizer's special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer

from pipeline.parsers.registry import forms


def special_tags(tokenizer: Tokenizer) -> dict[int, str]:
    """Special tokens that say what the model means, and so must not be left out of a chat's text."""
    tags = {tag for form in forms() for tag in form.tags}
    added = tokenizer.get_added_tokens_decoder().items()
    return {token_id: token.content for token_id, token in added if token.special and token.content in tags}
