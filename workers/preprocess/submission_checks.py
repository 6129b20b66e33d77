"""Checks of a submission: all that can be refused before media are fetched is refused here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import assert_never

from pipeline.families import TextInfo
from pipeline.parsers.tool_choice import read_tools
from pipeline.wire.clients import MAX_SALT_BYTES, MAX_TENANT, SubmitRequest
from pipeline.wire.errors import MODEL_NOT_FOUND, ErrorInfo, RequestError, context_overflow, shown
from pipeline.wire.limits import MAX_MESSAGES, MAX_PARTS, MAX_TOOL_CALLS
from pipeline.wire.packing import unpack_int32
from pipeline.wire.prompts import TEMPLATE_OPTIONS, Chat, Prompt, Text, Tokens
from workers.preprocess.chats import parts_of, texts_of

ALL = "all"  # every tenant may set a priority


def check_submission(
    message: SubmitRequest, text: TextInfo, allow_priority: Sequence[str], adapters: Sequence[str] = ()
) -> None:
    """Raises RequestError, naming the field at fault."""
    vocab_size = text.vocab_size
    if message.adapter and message.adapter not in adapters:
        served = f"only {', '.join(map(repr, adapters))}" if adapters else "and there is none"
        what = f"the adapter {shown(message.adapter)} is not served here, {served}"
        raise RequestError.from_info(ErrorInfo(404, what, "adapter", MODEL_NOT_FOUND))
    _check_prompt(message.prompt, text, message.sampling.truncate_prompt_tokens is not None)
    if message.attempt < 1:
        raise RequestError("attempt counts from 1", field="attempt")
    _check_choices(message, text)
    for banned in message.sampling.banned_token_ids:
        _check_token_ids(banned, text, "banned_token_ids", "banned_token_ids")
    if not -(2**31) <= message.priority < 2**31:
        raise RequestError(f"priority must fit 32 bits, got {message.priority}", field="priority")
    if message.priority and not may_have_priority(message.tenant, allow_priority):
        raise RequestError("--allow-priority says who may set a priority", field="priority")
    if len(message.cache_salt) > MAX_SALT_BYTES:
        raise RequestError(f"cache_salt has at most {MAX_SALT_BYTES} bytes", field="cache_salt")
    if len(message.tenant) > MAX_TENANT:
        raise RequestError(f"the name of a tenant has at most {MAX_TENANT} characters", field="tenant")
    for name, ids in (
        ("stop_token_ids", message.sampling.stop_token_ids),
        ("logit_bias", message.sampling.logit_bias),
        ("thinking_end", message.sampling.thinking_end),
        ("allowed_token_ids", message.sampling.allowed_token_ids or ()),
    ):
        if wrong := [token_id for token_id in ids if token_id >= vocab_size]:
            raise RequestError(
                f"{name} names the token {wrong[0]}, but the vocabulary has {vocab_size}", field=name
            )


def _check_prompt(prompt: Prompt, info: TextInfo, is_truncated: bool) -> None:
    match prompt:
        case Chat():
            _check_chat(prompt)
        case Text(text):
            if not text:
                raise RequestError("the prompt must not be empty", field="prompt")
        case Tokens(token_ids):
            if not token_ids:
                raise RequestError("the prompt must not be empty", field="prompt")
            _check_token_ids(token_ids, info, "token_ids", "prompt", is_truncated)
        case _:
            assert_never(prompt)


def _check_chat(chat: Chat) -> None:
    messages = chat.messages
    if not messages:
        raise RequestError("messages must not be empty", field="messages")
    for count, limit, what in (
        (len(messages), MAX_MESSAGES, "there are {} messages"),
        (len(parts_of(messages)), MAX_PARTS, "the messages have {} parts"),
        (sum(len(message.tool_calls) for message in messages), MAX_TOOL_CALLS, "the messages have {} calls"),
    ):
        if count > limit:
            raise RequestError(f"{what.format(count)}, the limit is {limit}", field="messages")
    if unknown := [name for name in chat.template_options if name not in TEMPLATE_OPTIONS]:
        what = f"unknown option {shown(unknown[0])}; known are {', '.join(TEMPLATE_OPTIONS)}"
        raise RequestError(what, field="template_options")
    if chat.continue_final_message and chat.add_generation_prompt:
        what = "continue_final_message needs add_generation_prompt to be false"
        raise RequestError(what, field="continue_final_message")
    read_tools(chat.tools)


def _check_choices(message: SubmitRequest, info: TextInfo) -> None:
    if len(message.choices) > message.sampling.n:
        raise RequestError(f"there are more choices than n, {message.sampling.n}", field="choices")
    for choice in message.choices:
        _check_token_ids(choice.output_token_ids, info, "output_token_ids", "choices")


def _check_token_ids(data: bytes, info: TextInfo, name: str, field: str, is_truncated: bool = False) -> None:
    if len(data) % 4:
        raise RequestError(f"{name} are not whole numbers", field=field)
    if (count := len(data) // 4) > (limit := info.max_position_embeddings) and not is_truncated:
        raise RequestError.from_info(context_overflow(limit, count, None, field))
    token_ids = unpack_int32(data)
    if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < info.vocab_size:
        raise RequestError(f"{name} are outside the vocabulary", field=field)


def may_have_priority(tenant: str, allowed: Sequence[str]) -> bool:
    """Whether a tenant may set a priority. Only tenants named by a key can be allowed by name, as no other
    client can take such a name."""
    kind, _, name = tenant.partition(":")
    return ALL in allowed or (kind in ("key", "curve") and name in allowed)


def tenant_of(message: SubmitRequest) -> str:
    """The tenant that the request names, else its client. `check_submission` refuses too long a name."""
    return message.tenant[:MAX_TENANT] or f"client:{message.client_id.hex()}"


def num_held_bytes(message: SubmitRequest) -> int:
    """Bytes of a submission's texts and tokens in memory, where one emoji makes each character of its text
    take four bytes."""
    num_progress_bytes = sum(len(choice.output_token_ids) for choice in message.choices)
    grammar = message.sampling.grammar
    num_grammar_bytes = 0 if grammar is None else sys.getsizeof(grammar.source)
    return num_progress_bytes + num_grammar_bytes + _num_prompt_bytes(message.prompt)


def _num_prompt_bytes(prompt: Prompt) -> int:
    match prompt:
        case Chat(messages):
            texts = sum(sys.getsizeof(text) for message in messages for text in texts_of(message))
            return texts + len(prompt.tools)
        case Text(text):
            return sys.getsizeof(text)
        case Tokens(token_ids):
            return len(token_ids)
        case _:
            assert_never(prompt)
