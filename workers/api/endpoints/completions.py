"""POST /v1/completions: prompts as text or as token ids, without a chat template, and their continuations."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from pipeline.wire.errors import RequestError, shown
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Prompt, Text, Tokens
from pipeline.wire.sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from workers.api.answer import Answer, ChoiceAnswer, TokenScores, Update
from workers.api.endpoints.base import Endpoint, Json, ServedModel
from workers.api.endpoints.openai import usage_object
from workers.api.parsers.base import Content
from workers.api.request_fields import StreamOptions, check_request
from workers.api.sampling_fields import SamplingFields, check_max_tokens, to_sampling
from workers.api.server_sent_events import DONE, event
from workers.api.submission import Submission

MAX_PROMPTS = 1024  # of one request
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this route


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[Any]
    max_tokens: int | None = None
    logprobs: int | None = None  # so many best tokens; 0: the chosen one alone
    best_of: int | None = None  # draw so many, and answer with the n likeliest
    echo: bool = False  # the prompt comes before its continuation


def to_prompts(given: str | list[Any]) -> list[Prompt]:
    """Raises RequestError for a prompt that is neither text nor token ids, nor a list of one of them."""
    if isinstance(given, str) or (given and all(isinstance(item, int) for item in given)):
        return [_to_prompt(given, "prompt")]
    if not 0 < len(given) <= MAX_PROMPTS:
        what = f"a request has 1 to {MAX_PROMPTS} prompts, got {len(given)}"
        raise RequestError(what, field="prompt")
    return [_to_prompt(item, f"prompt[{index}]") for index, item in enumerate(given)]


def _to_prompt(given: object, field: str) -> Prompt:
    if isinstance(given, str):
        return Text(given)
    if not isinstance(given, list) or not all(map(_is_token_id, given)):
        raise RequestError(f"a prompt is a text or a list of token ids, got {shown(given)}", field=field)
    return Tokens(pack_int32(given))


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class Completions(Endpoint):
    path = "/v1/completions"

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._num_logprobs: int | None = None
        self._options: StreamOptions | None = None
        self._echoed: Sequence[Prompt] = ()
        self._num_choices = self._num_drawn = 1  # of each prompt

    def decode(self, body: bytes | bytearray) -> Submission:
        request = self.read(body, CompletionRequest)
        check_request(request, self.model.name)
        prompts = to_prompts(request.prompt)
        self._num_logprobs, self._options = request.logprobs, request.stream_options
        self._echoed = prompts if request.echo else ()
        if request.echo and request.logprobs is not None:
            raise RequestError("logprobs of an echoed prompt are not served by this server", field="echo")
        sampling = self._sampling(request)
        return Submission(
            request_id=self._id,
            prompt=prompts[0],
            further_prompts=prompts[1:],
            sampling=sampling,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            is_streamed=request.stream,
        )

    def _sampling(self, request: CompletionRequest) -> SamplingParams:
        check_max_tokens(request.max_tokens, "max_tokens")
        if (count := request.logprobs) is not None and not 0 <= count <= MAX_LOGPROBS:
            what = f"logprobs must be between 0 and {MAX_LOGPROBS}, got {shown(count)}"
            raise RequestError(what, field="logprobs")
        num_choices, num_drawn = request.n or 1, request.best_of or request.n or 1
        if not num_choices <= num_drawn <= MAX_CHOICES:
            what = f"best_of must be between n and {MAX_CHOICES}, got {shown(num_drawn)}"
            raise RequestError(what, field="best_of")
        if request.stream and num_drawn > num_choices:
            raise RequestError("best_of beyond n cannot be streamed", field="best_of")
        self._num_choices, self._num_drawn = num_choices, num_drawn
        request.n = num_drawn
        return to_sampling(
            request,
            self.model.info.default_sampling,
            max_tokens=DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens,
            logprobs=0 if count is None and num_drawn > num_choices else count,
        )

    def render(self, answer: Answer) -> Json:
        choices = []
        for start in range(0, len(answer.choices), self._num_drawn):
            of_prompt = answer.choices[start : start + self._num_drawn]
            if self._num_drawn > self._num_choices:
                of_prompt = sorted(of_prompt, key=_mean_logprob, reverse=True)[: self._num_choices]
            echo = self._echo(answer, start // self._num_drawn)
            choices += [self._choice(choice, echo) for choice in of_prompt]
        indexed = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {**self._head(), "choices": indexed, "usage": usage_object(answer.usage)}

    def _choice(self, choice: ChoiceAnswer, echo: str) -> Json:
        return {
            "text": echo + "".join(choice.content),
            "logprobs": self._logprobs(choice.logprobs, len(echo)),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.last_piece.stop_reason if choice.last_piece else None,
        }

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """Each choice's text as it comes and its finish reason; then the usage if requested."""
        offsets = [0] * len(answer.choices)
        for index in range(len(answer.choices)) if self._echoed else ():
            echo = self._echo(answer, index // self._num_drawn)
            offsets[index] = len(echo)
            yield self._chunk(answer, {"index": index, "text": echo})
        async for update in updates:
            for choice in self._chunks(update, offsets):
                yield self._chunk(answer, choice)
        if self._options is not None and self._options.include_usage:
            yield event({**self._head(), "choices": [], "usage": usage_object(answer.usage)})
        yield DONE

    def _chunks(self, update: Update, offsets: list[int]) -> Iterator[Json]:
        text = "".join(one.text for one in update.events if isinstance(one, Content))
        logprobs = self._logprobs(update.logprobs, offsets[update.choice])
        offsets[update.choice] += len(text)
        if text or update.logprobs or update.finish_reason is not None:
            yield {
                "index": update.choice, "text": text, "logprobs": logprobs,
                "finish_reason": update.finish_reason, "stop_reason": update.stop_reason,
            }  # fmt: skip

    def _echo(self, answer: Answer, prompt: int) -> str:
        if not self._echoed:
            return ""
        match self._echoed[prompt]:
            case Text(text):
                return text
            case Tokens(token_ids):
                return answer.text_of(unpack_int32(token_ids).tolist())
            case _:
                raise AssertionError("a chat has no place in this route")

    def _head(self) -> Json:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self.model.name,
        }

    def _chunk(self, answer: Answer, choice: Json) -> bytes:
        whole = {"logprobs": None, "finish_reason": None, **choice}
        chunk = {**self._head(), "choices": [whole]}
        if self._options is not None and self._options.continuous_usage_stats:
            chunk["usage"] = usage_object(answer.usage)
        return event(chunk)

    def _logprobs(self, tokens: Sequence[TokenScores], offset: int) -> Json | None:
        """OpenAI's older form: lists side by side. `offset`: characters before the first token."""
        if self._num_logprobs is None:
            return None
        texts = [token.chosen.text.decode(errors="replace") for token in tokens]
        *offsets, _ = itertools.accumulate(map(len, texts), initial=offset)
        best = [
            {
                one.text.decode(errors="replace"): max(one.logprob, -9999.0)
                for one in (token.chosen, *token.best)
            }
            for token in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [max(token.chosen.logprob, -9999.0) for token in tokens],
            "top_logprobs": best if self._num_logprobs else None,
            "text_offset": offsets,
        }


def _mean_logprob(choice: ChoiceAnswer) -> float:
    return sum(token.chosen.logprob for token in choice.logprobs) / max(1, len(choice.logprobs))


ROUTES = (Completions,)
