"""POST /tokenize and /detokenize: the token ids of a text or a chat, and the text of token ids; POST
/v1/chat/completions/render: the prompt of a chat."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgspec

from pipeline.wire.errors import RequestError
from pipeline.wire.packing import pack_int32
from pipeline.wire.prompts import Prompt, Text, Tokens
from pipeline.wire.sampling import SamplingParams
from workers.api.answer import Answer, Update
from workers.api.chat_request import ChatCompletionRequest, RequestMessage
from workers.api.chat_submission import to_submission
from workers.api.description.answers import Detokenized, RenderedChat, Tokenized
from workers.api.description.schemas import NULL, TEXT, TOKEN_ID, listed, one_of, opened
from workers.api.endpoints.base import Endpoint, Json
from workers.api.submission import Submission, for_its_prompt

NO_MESSAGES = one_of([None, []])


class TokenizeRequest(ChatCompletionRequest, kw_only=True):
    """Of a text, or of a chat."""

    messages: list[RequestMessage] = msgspec.field(default_factory=list)
    prompt: str | None = None
    content: str | None = None  # llama.cpp's name for it
    return_token_strs: bool = False
    with_pieces: bool = False  # llama.cpp's: tokens are objects with their text
    add_special_tokens: bool = True  # models of these families have none to add
    add_special: bool = False
    parse_special: bool = True


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str = ""
    tokens: list[int]


class _Inspection(Endpoint):
    """Asks for a prompt's tokens."""

    streams = False

    def submission(self, prompt: Prompt, truncate: int | None = None) -> Submission:
        sampling = SamplingParams(max_tokens=0, truncate_prompt_tokens=truncate)
        return Submission(request_id=f"tok-{uuid.uuid4().hex}", prompt=prompt, sampling=sampling)

    def submission_of(self, chat: ChatCompletionRequest) -> Submission:
        submission = to_submission(chat, self.model, f"tok-{uuid.uuid4().hex}")
        return for_its_prompt(submission, self.model.max_model_len)

    def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        raise AssertionError("no such request is streamed")


class Tokenize(_Inspection):
    path, fields, answer = "/tokenize", TokenizeRequest, Tokenized
    form: ClassVar = {
        "oneOf": [
            opened({"prompt": TEXT}, {"content": NULL, "messages": NO_MESSAGES}),
            opened({"content": TEXT}, {"prompt": NULL, "messages": NO_MESSAGES}),
            opened({"messages": listed({}, minItems=1)}, {"prompt": NULL, "content": NULL}),
        ]
    }

    def decode(self, body: bytes | bytearray) -> Submission:
        request: TokenizeRequest = self.read(body)
        self.choose_model(request.model)
        if not request.parse_special:
            what = "parse_special is not served by this server but as true: a special token in a text is one"
            raise RequestError(what, field="parse_special")
        given = [text for text in (request.prompt, request.content) if text is not None]
        if len(given) + bool(request.messages) != 1:
            raise RequestError("a request has one prompt, or messages", field="prompt")
        self._wants_texts, self._wants_pieces = request.return_token_strs, request.with_pieces
        if not given:
            return self.submission_of(request)
        return self.submission(Text(given[0]), request.truncate_prompt_tokens)

    def render(self, answer: Answer) -> Json:
        token_ids = list(answer.prompts[0].token_ids)
        texts = [answer.text_of([token]) for token in token_ids]
        tokens: list[Any] = token_ids
        if self._wants_pieces:
            tokens = [{"id": token, "piece": text} for token, text in zip(token_ids, texts, strict=True)]
        return {
            "count": len(token_ids),
            "max_model_len": self.model.max_model_len,
            "tokens": tokens,
            "token_strs": texts if self._wants_texts else None,
        }


class Detokenize(_Inspection):
    path, fields, answer = "/detokenize", DetokenizeRequest, Detokenized
    forms: ClassVar = {"tokens": listed(TOKEN_ID)}

    def decode(self, body: bytes | bytearray) -> Submission:
        request: DetokenizeRequest = self.read(body)
        self.choose_model(request.model)
        if not all(0 <= token < 2**31 for token in request.tokens):
            raise RequestError("token ids are 0 or more, and fit 32 bits", field="tokens")
        return self.submission(Tokens(pack_int32(request.tokens)))

    def render(self, answer: Answer) -> Json:
        text = answer.text_of(answer.prompts[0].token_ids)
        return {"prompt": text, "content": text}


class Render(_Inspection):
    path, fields, answer = "/v1/chat/completions/render", ChatCompletionRequest, RenderedChat

    def decode(self, body: bytes | bytearray) -> Submission:
        request: ChatCompletionRequest = self.read(body)
        self.choose_model(request.model)
        return self.submission_of(request)

    def render(self, answer: Answer) -> Json:
        token_ids = list(answer.prompts[0].token_ids)
        return {
            "object": "chat.completion.render", "model": self.model.name,
            "prompt_token_ids": token_ids, "token_ids": token_ids,
            "prompt": answer.text_of(token_ids), "count": len(token_ids),
        }  # fmt: skip


ROUTES = (Tokenize, Detokenize, Render)
