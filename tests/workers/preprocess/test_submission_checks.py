"""What of a chat is refused before anything is fetched or rendered."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.wire.clients import SubmitRequest
from pipeline.wire.errors import RequestError
from pipeline.wire.limits import MAX_TOOL_CALLS, MAX_TOOLS
from pipeline.wire.packing import pack_int32
from pipeline.wire.prompts import Chat, ChatMessage, ToolCall
from pipeline.wire.sampling import SamplingParams
from tests.tool_chats import BARE, TOOL_CHATS, TOOLS, to_chat
from workers.preprocess.submission_checks import check_submission, num_held_bytes

TEXT = read_model_info(EMBEDDED / "model").text
HELLO = (ChatMessage("user", "Hello"),)
CALLS = (ToolCall("x", "now"),) * (MAX_TOOL_CALLS + 1)


def submission(chat: Chat, **sampling: Any) -> SubmitRequest:
    return SubmitRequest(
        client_id=b"c" * 16, request_id="r", attempt=1, prompt=chat, sampling=SamplingParams(**sampling)
    )


@pytest.mark.parametrize("name", TOOL_CHATS)
def test_chats_with_tools_pass(name: str) -> None:
    check_submission(submission(to_chat(TOOL_CHATS[name], TOOLS)), TEXT, ())


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (Chat(HELLO, b"{"), "tools"),
        (Chat(HELLO, b"{}"), "tools"),
        (Chat(HELLO, b"\xff"), "tools"),
        (Chat(HELLO, b"[" * 100_000), "tools"),
        (Chat(HELLO, json.dumps([BARE] * (MAX_TOOLS + 1)).encode()), "tools"),
        (Chat(HELLO, b"[1]"), "tools[0]"),
        (Chat(HELLO, b'[{"type": "web_search"}]'), "tools[0]"),
        (Chat(HELLO, b'[{"type": "function", "function": {"name": ""}}]'), "tools[0].function.name"),
        (Chat(HELLO, template_options={"messages": 1}), "template_options"),
        (Chat(HELLO, continue_final_message=True), "continue_final_message"),
        (Chat((ChatMessage("assistant", "", CALLS),)), "messages"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_chat_is_refused_by_name(chat: Chat, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_submission(submission(chat), TEXT, ())
    assert caught.value.info.field == field


@pytest.mark.parametrize("token_id", [-1, TEXT.vocab_size])
def test_tokens_outside_the_vocabulary_are_not_banned(token_id: int) -> None:
    """The LLM takes them as indices: a negative one ended its process."""
    with pytest.raises(RequestError) as caught:
        check_submission(submission(Chat(HELLO), banned_token_ids=(pack_int32([1, token_id]),)), TEXT, ())
    assert caught.value.info.field == "banned_token_ids"
    check_submission(submission(Chat(HELLO), banned_token_ids=(pack_int32([0, 1]),)), TEXT, ())


def test_tokens_outside_the_vocabulary_end_no_thought() -> None:
    with pytest.raises(RequestError) as caught:
        check_submission(submission(Chat(HELLO), thinking_end=(TEXT.vocab_size,)), TEXT, ())
    assert caught.value.info.field == "thinking_end"


def test_all_texts_count_as_held() -> None:
    call = ToolCall("i", "n", "x" * 1000)
    message = ChatMessage("assistant", "", (call,), reasoning="y" * 2000)
    size = num_held_bytes(submission(Chat((message,), b"z" * 4000)))
    assert 7000 <= size < 8000
