"""A request's answer, independent of the endpoint. Pure: takes pieces of text, returns updates of choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import numpy as np

from pipeline.client.client import Piece
from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import FinishReason
from pipeline.parsers.base import Content, Parser, ParserEvent, Thought


class ScoredToken(NamedTuple):
    text: bytes  # need not be whole characters
    logprob: float


class TokenScores(NamedTuple):
    """The chosen token at one place of the output, and the likeliest tokens there."""

    chosen: ScoredToken
    best: tuple[ScoredToken, ...]


class Update(NamedTuple):
    """The addition of one piece to a choice."""

    choice: int
    events: Sequence[ParserEvent]
    logprobs: Sequence[TokenScores]
    finish_reason: FinishReason | None  # of a choice's last update


class Usage(NamedTuple):
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt


@dataclass(slots=True)
class ChoiceAnswer:
    """One choice's answer so far."""

    parser: Parser
    content: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    logprobs: list[TokenScores] = field(default_factory=list)
    last_piece: Piece | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.last_piece.finish_reason if self.last_piece else None

    @property
    def usage(self) -> Usage:
        if (piece := self.last_piece) is None:
            return Usage(0, 0, 0)
        return Usage(piece.num_prompt_tokens, piece.num_output_tokens, piece.num_cached_tokens)


class Answer:
    """All choices of one request. `token_text` gives a token's bytes."""

    def __init__(
        self, num_choices: int, make_parser: Callable[[], Parser], token_text: Callable[[int], bytes]
    ) -> None:
        self.choices = [ChoiceAnswer(make_parser()) for _ in range(num_choices)]
        self._token_text = token_text

    @property
    def usage(self) -> Usage:
        """The prompt counts once, however many choices there are."""
        first = self.choices[0].usage
        return first._replace(
            num_output_tokens=sum(choice.usage.num_output_tokens for choice in self.choices)
        )

    def add(self, piece: Piece) -> Update:
        """Counts a piece of a choice and parses its text, which is not kept, as a stream may be long."""
        choice = self.choices[piece.index]
        choice.last_piece = piece
        events = choice.parser.add(piece.text)
        if piece.finish_reason is not None:
            events = (*events, *choice.parser.finish())
        logprobs = [self._scores(token) for token in piece.logprobs] if piece.logprobs else ()
        return Update(piece.index, events, logprobs, piece.finish_reason)

    def keep(self, update: Update) -> None:
        """Keeps an update for `render`: only answers that are not streamed need it."""
        choice = self.choices[update.choice]
        choice.logprobs += update.logprobs
        for event in update.events:
            match event:
                case Content(text):
                    choice.content.append(text)
                case Thought(text):
                    choice.thoughts.append(text)
                case _:
                    assert_never(event)

    def _scores(self, token: TokenLogprobs) -> TokenScores:
        values: list[float] = np.frombuffer(token.logprobs, dtype="<f4").tolist()
        ids = unpack_int32(token.token_ids).tolist()
        chosen, *best = [
            ScoredToken(self._token_text(token_id), value)
            for token_id, value in zip(ids, values, strict=True)
        ]
        return TokenScores(chosen, tuple(best))
