"""POST /v1/completions: prompts as text or as token ids, without a chat template, and their continuations."""

from __future__ import annotations

import itertools
import math
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar

from pipeline.parsers.base import Content
from pipeline.wire.errors import RequestError, shown
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.prompts import Prompt, Text, Tokens
from pipeline.wire.sampling import MAX_CHOICES, MAX_LOGPROBS, SamplingParams
from workers.api.answer import Answer, ChoiceAnswer, ScoredToken, TokenScores, Update
from workers.api.description.answers import Completion
from workers.api.description.schemas import TEXT, TOKEN_ID, any_of, listed
from workers.api.endpoints.base import Endpoint, Json, ServedModel
from workers.api.endpoints.openai import LEAST_LOGPROB, prompt_logprobs, usage_object
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
    path, fields, answer = "/v1/completions", CompletionRequest, Completion
    forms: ClassVar = {
        "prompt": any_of(
            TEXT,
            listed(TOKEN_ID, minItems=1),
            listed(any_of(TEXT, listed(TOKEN_ID)), minItems=1, maxItems=MAX_PROMPTS),
        ),
        "max_tokens": {"type": ["integer", "null"], "minimum": -1, "maximum": 2**31 - 1},
    }

    def __init__(self, model: ServedModel) -> None:
        super().__init__(model)
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self._num_logprobs: int | None = None
        self._options: StreamOptions | None = None
        self._echoed: Sequence[Prompt] = ()
        self._num_choices = self._num_drawn = 1  # of each prompt
        self._is_prompt_alone = False  # the one token behind it, which the pipeline needs, is not shown
        self._wants_prompt_logprobs = self._wants_token_ids = self._is_truncated = False

    def decode(self, body: bytes | bytearray) -> Submission:
        request: CompletionRequest = self.read(body)
        check_request(request)
        self.choose_model(request.model)
        prompts = to_prompts(request.prompt)
        self._num_logprobs, self._options = request.logprobs, request.stream_options
        self._echoed = prompts if request.echo else ()
        self._is_prompt_alone = request.echo and request.max_tokens == 0
        self._wants_prompt_logprobs = request.prompt_logprobs is not None
        self._wants_token_ids = bool(request.return_token_ids)
        self._is_truncated = request.truncate_prompt_tokens is not None
        if request.echo and self._is_truncated:
            request.return_token_ids = True  # what is left of the prompt is echoed
        sampling = self._sampling(request)
        return Submission(
            request_id=self._id,
            prompt=prompts[0],
            further_prompts=prompts[1:],
            sampling=sampling,
            priority=request.priority or 0,
            cache_salt=request.cache_salt or "",
            adapter=self.model.adapter,
            is_streamed=request.stream,
        )

    def _sampling(self, request: CompletionRequest) -> SamplingParams:
        if self._is_prompt_alone:
            request.max_tokens = 1
        check_max_tokens(request.max_tokens, "max_tokens")
        if (count := request.logprobs) is not None and not 0 <= count <= MAX_LOGPROBS:
            what = f"logprobs must be between 0 and {MAX_LOGPROBS}, got {shown(count)}"
            raise RequestError(what, field="logprobs")
        num_choices = 1 if request.n is None else request.n
        num_drawn = num_choices if request.best_of is None else request.best_of
        if not 1 <= num_choices <= num_drawn <= MAX_CHOICES:
            name = "n" if request.best_of is None else "best_of"
            limits = f"between {'1' if name == 'n' else 'n'} and {MAX_CHOICES}"
            raise RequestError(f"{name} must be {limits}, got {shown(num_drawn)}", field=name)
        if request.stream and num_drawn > num_choices:
            raise RequestError("best_of beyond n cannot be streamed", field="best_of")
        self._num_choices, self._num_drawn = num_choices, num_drawn
        request.n = num_drawn
        if request.stream and self._wants_prompt_logprobs:
            raise RequestError("prompt_logprobs cannot be streamed", field="prompt_logprobs")
        if request.echo and count is not None:
            request.prompt_logprobs = max(count, request.prompt_logprobs or 0)
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
            prompt = start // self._num_drawn
            choices += [self._choice(choice, answer, prompt) for choice in of_prompt]
        indexed = [{"index": index, **choice} for index, choice in enumerate(choices)]
        return {**self._head(), "choices": indexed, "usage": usage_object(answer.usage)}

    def _choice(self, choice: ChoiceAnswer, answer: Answer, prompt: int) -> Json:
        echo, of_prompt = self._echo(answer, prompt), answer.prompts[prompt]
        echoed = self._echoed_scores(answer, prompt)
        made: Json = {
            "text": echo + "".join(choice.content),
            "logprobs": self._logprobs(choice.logprobs, len(echo), echoed),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.last_piece.stop_reason if choice.last_piece else None,
        }
        token_ids: Sequence[int] = choice.token_ids
        if self._is_prompt_alone:
            logprobs = self._logprobs((), len(echo), echoed)
            made |= {"text": echo, "logprobs": logprobs, "finish_reason": "length", "stop_reason": None}
            token_ids = ()
        if self._wants_prompt_logprobs:
            made["prompt_logprobs"] = prompt_logprobs(of_prompt)
        if self._wants_token_ids:
            made |= {"token_ids": list(token_ids), "prompt_token_ids": list(of_prompt.token_ids)}
        return made

    async def stream(self, answer: Answer, updates: AsyncIterator[Update]) -> AsyncIterator[bytes]:
        """Each choice's text as it comes and its finish reason; then the usage if requested."""
        offsets: dict[int, int] = {}  # characters of each choice so far
        async for update in updates:
            prompt, is_first = update.choice // self._num_drawn, update.choice not in offsets
            if is_first:
                echo = self._echo(answer, prompt)
                offsets[update.choice] = len(echo)
                if self._echoed:
                    logprobs = self._logprobs((), 0, self._echoed_scores(answer, prompt))
                    yield self._chunk(answer, {"index": update.choice, "text": echo, "logprobs": logprobs})
            chunk = self._delta(update, offsets[update.choice])
            offsets[update.choice] += len(chunk["text"])
            if self._wants_token_ids and is_first:
                chunk["prompt_token_ids"] = list(answer.prompts[prompt].token_ids)
            if chunk["text"] or update.token_ids or update.finish_reason is not None:
                yield self._chunk(answer, chunk)
        if self._options is not None and self._options.include_usage:
            yield event({**self._head(), "choices": [], "usage": usage_object(answer.usage)})
        yield DONE

    def _delta(self, update: Update, offset: int) -> Json:
        if self._is_prompt_alone:
            return {"index": update.choice, "text": "", "finish_reason": update.finish_reason and "length"}
        chunk = {
            "index": update.choice,
            "text": "".join(one.text for one in update.events if isinstance(one, Content)),
            "logprobs": self._logprobs(update.logprobs, offset),
            "finish_reason": update.finish_reason,
            "stop_reason": update.stop_reason,
        }
        if self._wants_token_ids:
            chunk["token_ids"] = list(update.token_ids)
        return chunk

    def _echo(self, answer: Answer, prompt: int) -> str:
        if not self._echoed:
            return ""
        if self._is_truncated:
            return answer.text_of(answer.prompts[prompt].token_ids)
        match self._echoed[prompt]:
            case Text(text):
                return text
            case Tokens(token_ids):
                return answer.text_of(unpack_int32(token_ids).tolist())
            case _:
                raise AssertionError("a chat has no place in this route")

    def _echoed_scores(self, answer: Answer, prompt: int) -> Sequence[TokenScores]:
        """Of an echoed prompt, its first token included, which has no log-probability."""
        found = answer.prompts[prompt]
        if not self._echoed or not found.token_ids:
            return ()
        text = answer.text_of(found.token_ids[:1]).encode()
        return (TokenScores(ScoredToken(text, math.nan), ()), *found.scores)

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
        if self._options is not None and self._options.is_continuous:
            chunk["usage"] = usage_object(answer.usage)
        return event(chunk)

    def _logprobs(
        self, tokens: Sequence[TokenScores], offset: int, echoed: Sequence[TokenScores] = ()
    ) -> Json | None:
        """OpenAI's older form: lists side by side, the prompt's first. `offset`: characters before the first
        of the `tokens`."""
        if (num_best := self._num_logprobs) is None:
            return None
        scores = [*echoed, *tokens]
        texts = [token.chosen.text.decode(errors="replace") for token in scores]
        *offsets, _ = itertools.accumulate(map(len, texts), initial=0 if echoed else offset)
        best = [
            {
                one.text.decode(errors="replace"): _written(one)
                for one in (*token.best[:num_best], token.chosen)
            }
            for token in scores
        ]
        unscored = [math.isnan(token.chosen.logprob) for token in scores]
        tops = [None if no else of for no, of in zip(unscored, best, strict=True)]
        return {
            "tokens": texts,
            "token_logprobs": [_written(token.chosen) for token in scores],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def _written(token: ScoredToken) -> float | None:
    return None if math.isnan(token.logprob) else max(token.logprob, LEAST_LOGPROB)


def _mean_logprob(choice: ChoiceAnswer) -> float:
    return sum(token.chosen.logprob for token in choice.logprobs) / max(1, len(choice.logprobs))


ROUTES = (Completions,)
