"""A request's answer, independent of the endpoint. Pure: takes pieces of text, returns updates of choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import numpy as np

from pipeline.client.client import Piece
from pipeline.parsers.base import (
    Content,
    Parser,
    ParserEvent,
    Thought,
    ToolArguments,
    ToolCallBegun,
)
from pipeline.wire.clients import MediaTokens, PromptLogprobs, TokenLogprobs
from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import FinishReason


class ScoredToken(NamedTuple):
    text: bytes  # need not be whole characters
    logprob: float
    token_id: int = -1


class TokenScores(NamedTuple):
    """The chosen token at one place of the output, and the likeliest tokens there."""

    chosen: ScoredToken
    best: tuple[ScoredToken, ...]
    rank: int = 0  # of the chosen token, if it is one of a prompt; the likeliest has rank 1


class Update(NamedTuple):
    """The addition of one piece to a choice."""

    choice: int
    events: Sequence[ParserEvent]
    logprobs: Sequence[TokenScores]
    finish_reason: FinishReason | None  # of a choice's last update
    token_ids: Sequence[int] = ()
    stop_reason: str | int | None = None  # of a choice's last update: the stop string or token id it has met
    text_logprobs: Sequence[TokenScores] = ()  # of the content that this adds, its held back tokens included


class Usage(NamedTuple):
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt
    num_thought_tokens: int = 0  # of the output
    media: MediaTokens | None = None  # of the prompt


@dataclass(slots=True)
class Call:
    """A call of a function. `arguments` are pieces of its JSON."""

    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice's answer so far."""

    parser: Parser
    content: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenScores] = field(default_factory=list)
    text_logprobs: list[TokenScores] = field(default_factory=list)  # of the content alone
    token_ids: list[int] = field(default_factory=list)
    last_piece: Piece | None = None
    is_thinking: bool = False
    is_text: bool = True  # not a thought or a call, as far as is known
    unplaced: list[TokenScores] = field(default_factory=list)  # of tokens that have no event yet
    num_thought_tokens: int = 0

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last_piece.finish_reason if self.last_piece else None

    @property
    def usage(self) -> Usage:
        if (piece := self.last_piece) is None:
            return Usage(0, 0, 0)
        return Usage(
            piece.num_prompt_tokens,
            piece.num_output_tokens,
            piece.num_cached_tokens,
            self.num_thought_tokens,
            piece.media,
        )


@dataclass(slots=True)
class PromptAnswer:
    """What comes back about a prompt, if requested."""

    token_ids: Sequence[int] = ()
    scores: Sequence[TokenScores] = ()  # of the tokens behind the first


class Answer:
    """All choices of all prompts, the first prompt's first. `token_text` gives a token's bytes."""

    def __init__(
        self,
        num_choices: int,
        make_parser: Callable[[int], Parser],
        token_text: Callable[[int], bytes],
        num_prompts: int = 1,
    ) -> None:
        """`num_choices`: of each prompt. `make_parser`: for a choice of the prompt with this number."""
        self.choices = [
            ChoiceAnswer(make_parser(prompt)) for prompt in range(num_prompts) for _ in range(num_choices)
        ]
        self._num_choices, self._token_text = num_choices, token_text
        self.prompts = [PromptAnswer() for _ in range(num_prompts)]

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        of_choices = [choice.usage for choice in self.choices]
        of_prompts = of_choices[:: self._num_choices]
        return Usage(
            sum(usage.num_prompt_tokens for usage in of_prompts),
            sum(usage.num_output_tokens for usage in of_choices),
            sum(usage.num_cached_tokens for usage in of_prompts),
            sum(usage.num_thought_tokens for usage in of_choices),
            _sum_of([usage.media for usage in of_prompts if usage.media is not None]),
        )

    def add(self, piece: Piece, prompt: int = 0) -> Update:
        """Counts a piece of a choice and parses its text, which is not kept, as a stream may be long."""
        index = prompt * self._num_choices + piece.index
        choice = self.choices[index]
        choice.last_piece = piece
        if piece.prompt_token_ids:
            self.prompts[prompt].token_ids = piece.prompt_token_ids
        if piece.prompt_logprobs is not None:
            self.prompts[prompt].scores = self._prompt_scores(piece.prompt_logprobs)
        events = choice.parser.add(piece.text)
        if piece.finish_reason is not None:
            events = (*events, *choice.parser.finish())
        if events:
            choice.is_thinking = isinstance(events[0], Thought)
            choice.is_text = any(isinstance(event, Content) for event in events)
        choice.num_thought_tokens += len(piece.token_ids) if choice.is_thinking else 0
        logprobs = [self._scores(token) for token in piece.logprobs] if piece.logprobs else ()
        return Update(
            index,
            events,
            logprobs,
            piece.finish_reason,
            piece.token_ids,
            piece.stop_reason,
            self._of_text(choice, logprobs, bool(events) or piece.finish_reason is not None),
        )

    def _of_text(
        self, choice: ChoiceAnswer, logprobs: Sequence[TokenScores], is_told: bool
    ) -> Sequence[TokenScores]:
        if not logprobs and not choice.unplaced:
            return ()
        choice.unplaced += logprobs
        if not is_told and choice.is_text:
            return ()
        found, choice.unplaced = choice.unplaced, []
        return found if choice.is_text else ()

    def text_of(self, token_ids: Sequence[int]) -> str:
        return b"".join(map(self._token_text, token_ids)).decode(errors="replace")

    def keep(self, update: Update) -> None:
        """Keeps an update for `render`: only answers that are not streamed need it."""
        choice = self.choices[update.choice]
        choice.logprobs += update.logprobs
        choice.text_logprobs += update.text_logprobs
        choice.token_ids += update.token_ids
        for event in update.events:
            match event:
                case Content(text):
                    choice.content.append(text)
                case Thought(text):
                    choice.thoughts.append(text)
                case ToolCallBegun(_, name):
                    choice.calls.append(Call(name))
                case ToolArguments(index, text):
                    choice.calls[index].arguments.append(text)
                case _:
                    assert_never(event)

    def _scores(self, token: TokenLogprobs) -> TokenScores:
        values: list[float] = np.frombuffer(token.logprobs, dtype="<f4").tolist()
        return self._token_scores(unpack_int32(token.token_ids).tolist(), values)

    def _prompt_scores(self, told: PromptLogprobs) -> list[TokenScores]:
        ranks = unpack_int32(told.ranks).tolist()
        ids = unpack_int32(told.token_ids).reshape(len(ranks), -1).tolist()
        values = np.frombuffer(told.logprobs, dtype="<f4").reshape(len(ranks), -1).tolist()
        return [self._token_scores(*row) for row in zip(ids, values, ranks, strict=True)]

    def _token_scores(self, ids: Sequence[int], values: Sequence[float], rank: int = 0) -> TokenScores:
        chosen, *best = [
            ScoredToken(self._token_text(token_id), value, token_id)
            for token_id, value in zip(ids, values, strict=True)
        ]
        return TokenScores(chosen, tuple(best), rank)


def _sum_of(found: Sequence[MediaTokens]) -> MediaTokens | None:
    return MediaTokens(*map(sum, zip(*found, strict=True))) if found else None
