"""What the routes answer, for `/openapi.json`.

The answers themselves are made in `endpoints/`, as dicts. Tests hold them against these forms.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

Json = dict[str, Any]


class Form(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Of an object. A field that may be UNSET is only there if it was asked for."""


# Errors.


class ErrorDetails(Form):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Form):
    error: ErrorDetails


class AnthropicErrorDetails(Form):
    type: str
    message: str


class AnthropicError(Form):
    type: Literal["error"]
    error: AnthropicErrorDetails


# Chats and completions.


class MediaTokensObject(Form):
    """Tokens of pictures and videos: encoded for this request, kept by a ViT, or in the prefix cache."""

    encoded: int
    vit_cached: int
    prefix_cached: int


class CachedTokens(Form):
    cached_tokens: int


class PromptTokensDetails(CachedTokens):
    media_tokens: MediaTokensObject | UnsetType = UNSET  # of a prompt with pictures or videos


class ReasoningTokens(Form):
    reasoning_tokens: int


class UsageObject(Form):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: ReasoningTokens


class PromptLogprob(Form):
    logprob: float
    rank: int
    decoded_token: str


class TopLogprob(Form):
    token: str
    logprob: float
    bytes: list[int]


class Logprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Form):
    content: list[Logprob]
    refusal: None


class CalledFunction(Form):
    name: str
    arguments: str  # JSON


class AnswerCall(Form):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Form):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET  # the same
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class ChatChoice(Form):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "abort", "tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Form):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionLogprobs(Form):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(Form):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | int | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Form):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageObject


# Responses.


class ResponseText(Form, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any]
    logprobs: list[Logprob]


class ReasoningText(Form, tag_field="type", tag="reasoning_text"):
    text: str


class OutputItem(Form):
    id: str
    status: Literal["completed", "incomplete"]


class MessageItem(OutputItem, tag_field="type", tag="message"):
    role: Literal["assistant"]
    content: list[ResponseText]


class ReasoningItem(OutputItem, tag_field="type", tag="reasoning"):
    summary: list[Any]
    content: list[ReasoningText]


class CallItem(OutputItem, tag_field="type", tag="function_call"):
    call_id: str
    name: str
    arguments: str  # JSON


class ResponseUsage(Form):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(Form):
    reason: Literal["max_output_tokens"]


class Reasoning(Form):
    effort: str | None
    summary: Any


class Response(Form):
    """The answer, and what the request asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    background: Literal[False]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[MessageItem | ReasoningItem | CallItem]
    usage: ResponseUsage
    instructions: str | None
    max_output_tokens: int | None
    previous_response_id: str | None
    store: bool
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    top_logprobs: int
    tools: list[Json]
    tool_choice: Any
    parallel_tool_calls: bool
    text: Json
    truncation: Literal["disabled"]
    reasoning: Reasoning
    service_tier: Literal["default"]
    metadata: dict[str, str]
    user: str | None
    prompt_cache_key: str | None
    safety_identifier: str | None
    max_tool_calls: None
    completed_at: None


class DeletedObject(Form):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(Form):
    object: Literal["list"]
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


# Anthropic's.


class AnthropicUsage(Form):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextBlock(Form, tag_field="type", tag="text"):
    text: str


class ThinkingBlock(Form, tag_field="type", tag="thinking"):
    thinking: str
    signature: str


class ToolUseBlock(Form, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: Json


class AnthropicAnswer(Form):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(Form):
    input_tokens: int


# Prompts.


class TokenPiece(Form):
    id: int
    piece: str


class Tokenized(Form):
    count: int
    max_model_len: int
    tokens: list[int | TokenPiece]
    token_strs: list[str] | None


class Detokenized(Form):
    prompt: str
    content: str  # the same


class RenderedChat(Form):
    object: Literal["chat.completion.render"]
    model: str
    prompt_token_ids: list[int]
    token_ids: list[int]  # the same, under vLLM's name
    prompt: str
    count: int


# The server.


class ModelCard(Form):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None  # of an adapter: the model
    max_model_len: int


class ModelList(Form):
    object: Literal["list"]
    data: list[ModelCard]


class Readiness(Form):
    ready: bool
    draining: bool
    workers: dict[str, Literal["ready", "starting"]]


class ServerLoad(Form):
    server_load: int
    waiting_for_start: int


class Version(Form):
    version: str


class Killed(Form):
    status: Literal["killed"]
    worker: str
    epoch: int  # that has ended


class Reloading(Form):
    status: Literal["reloading"]
