"""Texts of refusals that client programs recognise."""

from __future__ import annotations

import pytest

from pipeline.wire.errors import MAX_MESSAGE, RequestError, context_overflow


@pytest.mark.parametrize("is_least", [False, True])
def test_an_overflow_is_recognised_by_the_clients_of_other_servers(is_least: bool) -> None:
    info = context_overflow(1 << 20, 1 << 24, 1 << 30, "messages", is_least=is_least)
    assert info.code == "context_length_exceeded"  # langchain, OpenAI's own
    assert (
        "this model's maximum context length is" in info.message.lower()
    )  # litellm; OpenAI's and vLLM's text
    assert "is longer than the model's context length" in info.message  # SGLang's
    assert f"However, you requested {'at least ' if is_least else ''}1090519040 tokens" in info.message
    assert len(info.message) <= MAX_MESSAGE
    assert RequestError.from_info(info).info == info
