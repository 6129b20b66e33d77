"""Answers of a server that would not write so by itself: put in the place of the real one's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def stream_of(deltas: Iterable[dict[str, Any]]) -> str:
    chunks = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    chunks.append({"choices": [], "usage": USAGE})  # type: ignore[dict-item]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answer_with(page: Any, text: str, thoughts: str = "", piece: int = 400) -> None:
    """From now on each question is answered with this."""
    deltas = [{"reasoning_content": thoughts}] if thoughts else []
    deltas += [{"content": text[start : start + piece]} for start in range(0, len(text), piece)]
    body = stream_of(deltas)
    page.unroute("**/v1/chat/completions")
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream; charset=utf-8"),
    )
