"""POST /v1/responses, and what was stored of earlier ones: OpenAI's Responses API."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, ClassVar

import msgspec

from pipeline.wire.errors import ErrorInfo, RequestError, shown
from pipeline.wire.sampling import FinishReason, SamplingParams
from workers.api.answer import Answer, Update, Usage
from workers.api.blocks import AnswerBlock, AnswerBlocks, BlockEvent, BlockKind, Grown, Opened, blocks_of
from workers.api.chat_submission import to_submission
from workers.api.description.answers import DeletedObject, Error, ItemList, Response
from workers.api.endpoints.base import Endpoint, Inquiry, Json, ServedModel
from workers.api.endpoints.openai import logprob_objects
from workers.api.request_fields import check_request
from workers.api.response_events import COMPLETED, IN_PROGRESS, EventWriter, ItemWriter
from workers.api.responses_request import (
    ResponsesRequest,
    check_items,
    check_responses,
    reference_of,
    to_chat_request,
    to_items,
)
from workers.api.server_sent_events import event
from workers.api.submission import Submission

INCOMPLETE = "incomplete"


class Responses(Endpoint):
    path, fields, answer = "/v1/responses", ResponsesRequest, Response
    field_names: ClassVar = {"response_format.json_schema": "text.format", "response_format": "text.format"}

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._echo: Json = {}  # of the request, in the response
        self._input = b""  # JSON of all items, to be stored
        self._is_stored = self._has_logprobs = False
        self._items = ItemWriter()

    def decode(self, body: bytes | bytearray) -> Submission:
        request: ResponsesRequest = self.read(body)
        check_request(request)
        self.choose_model(request.model)
        check_responses(request)
        given = to_items(request.input)
        check_items(given)
        items = self._resolved(given)
        if request.previous_response_id:
            before = self.model.store.items(
                request.previous_response_id, self.tenant, "previous_response_id", self.reserve
            )
            items = [*before, *items]
            check_items(items)
        chat = to_chat_request(request, items)
        submission = to_submission(chat, self.model, self._id)
        self._is_stored = request.store is not False
        self._input = msgspec.json.encode(items) if self._is_stored else b""
        self._has_logprobs = bool(chat.logprobs)
        self._echo = _echo(request, submission.sampling)
        return submission

    def _resolved(self, items: list[Json]) -> list[Json]:
        """With stored items in place of references to them, each at most once: short references to a long
        item would make a request of any size."""
        resolved, known = [], set[str]()
        for index, item in enumerate(items):
            if (item_id := reference_of(item)) is None:
                resolved.append(item)
                continue
            field = f"input[{index}].id"
            if item_id in known:
                raise RequestError(f"the item {shown(item_id)} is referred to twice", field=field)
            known.add(item_id)
            resolved.append(self.model.store.item(item_id, self.tenant, field))
        return resolved

    def render(self, answer: Answer) -> Json:
        (choice,) = answer.choices
        status = _status(choice.finish_reason)
        logprobs = logprob_objects(choice.text_logprobs) if self._has_logprobs else []
        blocks = blocks_of(choice)
        return self._finish(answer, self._output(blocks, status, lambda _: logprobs), status)

    def _output(
        self, blocks: Sequence[AnswerBlock], status: str, logprobs_of: Callable[[int], Sequence[Json]]
    ) -> list[Json]:
        """The status is that of the last item: those before it are complete."""
        statuses = [*[COMPLETED] * (len(blocks) - 1), status]
        return [
            self._items.item(block, one, logprobs_of(block.index) if block.kind is BlockKind.TEXT else ())
            for block, one in zip(blocks, statuses, strict=False)
        ]

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """The response without output, its items one after another, and the whole response."""
        (choice,) = answer.choices
        events, blocks = EventWriter(self._items), AnswerBlocks()
        for kind in ("response.created", "response.in_progress"):
            yield events.event(kind, response=self._response([], IN_PROGRESS))
        logprobs: defaultdict[int, list[Json]] = defaultdict(list)  # of each text so far, by its block
        new: list[Json] = []  # that no event has told yet

        def written(one: BlockEvent, status: str = COMPLETED) -> list[bytes]:
            told = logprobs[one.block.index]
            if one.block.kind is BlockKind.TEXT and not isinstance(one, Opened):
                told += new
                told = new.copy() if isinstance(one, Grown) else told
                new.clear()
            return list(events.of_block(one, told, status))

        async for update in updates:
            if self._has_logprobs:
                new += logprob_objects(update.text_logprobs)
            for one in blocks.add(update.events):
                for data in written(one):
                    yield data
        status = _status(choice.finish_reason)
        for one in blocks.finish():
            for data in written(one, status):
                yield data
        output = self._output(blocks.all, status, logprobs.__getitem__)
        whole = self._finish(answer, output, status)
        yield events.event(f"response.{status}", response=whole)

    @classmethod
    def last_words(cls, error: ErrorInfo) -> bytes:
        told = cls.error_body(error)["error"]
        body = {
            "type": "error", "code": told["code"] or told["type"], "message": told["message"],
            "param": told["param"], "sequence_number": 0,
        }  # fmt: skip
        return b"event: error\n" + event(body)

    def _finish(self, answer: Answer, output: list[Json], status: str) -> Json:
        response = self._response(output, status, answer.usage)
        if self._is_stored:
            self.model.store.put(self._id, self.tenant, self._input, output, response)
        return response

    def _response(self, output: list[Json], status: str, usage: Usage | None = None) -> Json:
        details = {"reason": "max_output_tokens"} if status == INCOMPLETE else None
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status,
            "background": False, "error": None, "incomplete_details": details, "model": self.model.name,
            "output": output, "usage": None if usage is None else _usage(usage), **self._echo,
        }  # fmt: skip


def _status(reason: FinishReason | None) -> str:
    return INCOMPLETE if reason is FinishReason.LENGTH else COMPLETED


def _usage(usage: Usage) -> Json:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_thought_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }


def _echo(request: ResponsesRequest, sampling: SamplingParams) -> Json:
    reasoning = request.reasoning or {}
    return {
        "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
        "previous_response_id": request.previous_response_id, "store": request.store is not False,
        "temperature": sampling.temperature, "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty,
        "top_logprobs": request.top_logprobs or 0, "tools": request.tools or [],
        "tool_choice": request.tool_choice or "auto", "parallel_tool_calls": request.parallel_tool_calls,
        "text": request.text or {"format": {"type": "text"}}, "truncation": "disabled",
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default", "metadata": request.metadata or {}, "user": request.user,
        "prompt_cache_key": request.prompt_cache_key, "safety_identifier": request.safety_identifier,
        "max_tool_calls": None, "completed_at": None,
    }  # fmt: skip


class FoundResponse(Inquiry):
    path, answer = "/v1/responses/{name}", Response

    def render(self, **places: str) -> Json:
        found: Json = msgspec.json.decode(self.model.store.get(places["name"], self.tenant).response)
        return found


class DeletedResponse(Inquiry):
    path, method, answer = "/v1/responses/{name}", "DELETE", DeletedObject

    def render(self, **places: str) -> Json:
        self.model.store.drop(places["name"], self.tenant)
        return {"id": places["name"], "object": "response", "deleted": True}


class InputItems(Inquiry):
    path, answer = "/v1/responses/{name}/input_items", ItemList

    def render(self, **places: str) -> Json:
        items: list[Any] = msgspec.json.decode(self.model.store.get(places["name"], self.tenant).input)
        listed = [{"id": f"item_{index}", "type": "message", **item} for index, item in enumerate(items)]
        ends = (listed[0]["id"], listed[-1]["id"]) if listed else (None, None)
        return {
            "object": "list", "data": listed, "first_id": ends[0], "last_id": ends[1], "has_more": False,
        }  # fmt: skip


class CancelledResponse(Inquiry):
    path, method, answer = "/v1/responses/{name}/cancel", "POST", Error  # always

    def render(self, **places: str) -> Json:
        self.model.store.get(places["name"], self.tenant)
        raise RequestError("only a response in the background can be cancelled, and none is served here")


ROUTES = (Responses, FoundResponse, DeletedResponse, InputItems, CancelledResponse)
