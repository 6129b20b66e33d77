"""POST /v1/chat/completions.

Unserved fields that would change the answer are refused by name, never ignored.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, assert_never

from pipeline.parsers.base import Content, ParserEvent, Thought, ToolArguments, ToolCallBegun
from pipeline.wire.errors import RequestError
from pipeline.wire.sampling import FinishReason
from workers.api.answer import Answer, Call, ChoiceAnswer, TokenScores, Update
from workers.api.chat_request import ChatCompletionRequest
from workers.api.chat_submission import to_submission
from workers.api.description.answers import ChatCompletion
from workers.api.endpoints.base import Endpoint, Json, ServedModel
from workers.api.endpoints.openai import logprob_objects, prompt_logprobs, usage_object
from workers.api.request_fields import StreamOptions, check_request
from workers.api.server_sent_events import DONE, EventForm, event
from workers.api.submission import Submission


class ChatCompletions(Endpoint):
    path, fields, answer = "/v1/chat/completions", ChatCompletionRequest, ChatCompletion

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self._options: StreamOptions | None = None
        self._has_logprobs = self._wants_prompt_logprobs = self._wants_token_ids = False
        self._includes_reasoning = True
        self._forms: dict[int, EventForm] = {}  # of chunks with nothing but their delta, by choice
        self._callers: set[int] = set()  # choices that have called a function

    def decode(self, body: bytes | bytearray) -> Submission:
        request: ChatCompletionRequest = self.read(body)
        check_request(request)
        self.choose_model(request.model)
        self._options, self._has_logprobs = request.stream_options, bool(request.logprobs)
        self._wants_prompt_logprobs = request.prompt_logprobs is not None
        self._wants_token_ids = bool(request.return_token_ids)
        self._includes_reasoning = request.include_reasoning
        if request.stream and self._wants_prompt_logprobs:
            raise RequestError("prompt_logprobs cannot be streamed", field="prompt_logprobs")
        return to_submission(request, self.model, self._id)

    def render(self, answer: Answer) -> Json:
        choices = [self._choice(index, choice) for index, choice in enumerate(answer.choices)]
        made = {**self._head("chat.completion"), "choices": choices, "usage": usage_object(answer.usage)}
        (prompt,) = answer.prompts
        if self._wants_prompt_logprobs:
            made["prompt_logprobs"] = prompt_logprobs(prompt)
        if self._wants_token_ids:
            made["prompt_token_ids"] = list(prompt.token_ids)
        return made

    def _choice(self, index: int, choice: ChoiceAnswer) -> Json:
        made: Json = {
            "index": index,
            "message": self._message(choice),
            "logprobs": _logprobs(choice.logprobs) if self._has_logprobs else None,
            "finish_reason": _finish_reason(choice.finish_reason, bool(choice.calls)),
            "stop_reason": choice.last_piece.stop_reason if choice.last_piece else None,
        }
        if self._wants_token_ids:
            made["token_ids"] = choice.token_ids
        return made

    def _message(self, choice: ChoiceAnswer) -> Json:
        content = "".join(choice.content)
        has_more = bool(choice.calls or choice.thoughts)
        message: Json = {
            "role": "assistant",
            "content": None if has_more and not content else content,
            "refusal": None,
        }
        if choice.thoughts and self._includes_reasoning:
            message |= _reasoning("".join(choice.thoughts))
        if choice.calls:
            message["tool_calls"] = [_call_object(call) for call in choice.calls]
        return message

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """Each choice's role, its text and calls as they come and its finish reason; then the usage if
        requested."""
        has_begun = False
        async for update in updates:
            if not has_begun:
                has_begun = True
                for chunk in self._roles(answer):
                    yield chunk
            for chunk in self._chunks(answer, update):
                yield chunk
        if self._options is not None and self._options.include_usage:
            usage = usage_object(answer.usage)
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage})
        yield DONE

    def _roles(self, answer: Answer) -> Iterator[bytes]:
        """The first chunk has the prompt's token ids if requested, as vLLM's has."""
        before = usage_object(answer.usage._replace(num_output_tokens=0, num_thought_tokens=0))
        for index in range(len(answer.choices)):
            chunk = self._chunk_object(index, delta={"role": "assistant", "content": ""})
            if index == 0 and self._wants_token_ids:
                chunk["prompt_token_ids"] = list(answer.prompts[0].token_ids)
            if self._has_usage:
                chunk["usage"] = before
            yield event(chunk)

    def _chunks(self, answer: Answer, update: Update) -> Iterator[bytes]:
        logprobs, token_ids = update.logprobs, update.token_ids
        deltas = [delta for one in update.events if (delta := self._delta(one, update.choice))]
        if not deltas and (logprobs or (token_ids and self._wants_token_ids)):
            deltas = [{"content": ""}]
        for delta in deltas:
            further: Json = {"token_ids": list(token_ids)} if self._wants_token_ids else {}
            if self._has_logprobs and logprobs:
                further["logprobs"] = _logprobs(logprobs)
            yield self._chunk(answer, update.choice, delta, further)
            logprobs = token_ids = ()  # only the first delta carries them
        if update.finish_reason is not None:
            finish = _finish_reason(update.finish_reason, update.choice in self._callers)
            last = {"finish_reason": finish, "stop_reason": update.stop_reason}
            yield self._chunk(answer, update.choice, {}, last)

    def _delta(self, parsed: ParserEvent, choice: int) -> Json | None:
        match parsed:
            case Content(text):
                return {"content": text}
            case Thought(text):
                return _reasoning(text) if self._includes_reasoning else None
            case ToolCallBegun(index, name):
                self._callers.add(choice)
                return {"tool_calls": [{"index": index, **_call_object(Call(name))}]}
            case ToolArguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case _:
                assert_never(parsed)

    def _head(self, kind: str) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.model.name}

    @property
    def _has_usage(self) -> bool:
        """Whether each chunk has the usage so far."""
        return self._options is not None and self._options.is_continuous

    def _chunk(self, answer: Answer, index: int, delta: Json, further: Json | None = None) -> bytes:
        if not further and not self._has_usage:
            if (form := self._forms.get(index)) is None:
                form = self._forms[index] = EventForm(self._chunk_object(index), ("choices", 0, "delta"))
            return form.event(delta)
        chunk = self._chunk_object(index, delta=delta, **(further or {}))
        if self._has_usage:
            chunk["usage"] = usage_object(answer.usage)
        return event(chunk)

    def _chunk_object(self, index: int, **fields: Any) -> Json:
        choice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None, **fields}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


def _finish_reason(reason: FinishReason | None, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and reason is FinishReason.STOP else reason


def _reasoning(text: str) -> Json:
    """By both of the names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


def _call_object(call: Call) -> Json:
    function = {"name": call.name, "arguments": "".join(call.arguments)}
    return {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}


def _logprobs(tokens: Sequence[TokenScores]) -> Json:
    """OpenAI's entries, one for each token."""
    return {"content": logprob_objects(tokens), "refusal": None}


ROUTES = (ChatCompletions,)
