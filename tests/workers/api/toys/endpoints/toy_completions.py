"""A route of the tests: a prompt, and its continuations in an object of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec

from pipeline.parsers.base import Content
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.prompts import Text
from workers.api.answer import Answer, Update
from workers.api.endpoints.base import Endpoint, Json
from workers.api.json_bodies import decode_json
from workers.api.request_fields import check_request
from workers.api.sampling_fields import SamplingFields, to_sampling
from workers.api.server_sent_events import event
from workers.api.submission import Submission


class ToyRequest(SamplingFields, kw_only=True):
    prompt: str
    budget: int | None = None


class ToyAnswer(msgspec.Struct):
    texts: list[str]
    spent: int


class ToyError(msgspec.Struct):
    oops: str


class ToyCompletions(Endpoint):
    path, fields, answer, error = "/toy/completions", ToyRequest, ToyAnswer, ToyError

    @classmethod
    def error_body(cls, error: ErrorInfo) -> Json:
        return {"oops": error.message}

    @classmethod
    def last_words(cls, error: ErrorInfo) -> bytes:
        return event(cls.error_body(error))

    def decode(self, body: bytes | bytearray) -> Submission:
        request = decode_json(body, ToyRequest)
        check_request(request)
        self.choose_model(request.model)
        defaults = self.model.info.default_sampling
        return Submission(
            request_id="toy",
            prompt=Text(request.prompt),
            sampling=to_sampling(request, defaults, max_tokens=request.budget, logprobs=None),
            is_streamed=request.stream,
        )

    def render(self, answer: Answer) -> Json:
        texts = ["".join(choice.content) for choice in answer.choices]
        return {"texts": texts, "spent": answer.usage.num_output_tokens}

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        async for update in updates:
            text = "".join(one.text for one in update.events if isinstance(one, Content))
            yield event({"at": update.choice, "text": text})
        yield event({"spent": answer.usage.num_output_tokens})


ROUTES = (ToyCompletions,)
