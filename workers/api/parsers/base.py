"""The contract of a parser: the text of one choice, piece by piece, becomes content, and what is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Thought(msgspec.Struct, frozen=True):
    """Text that the model writes before it answers."""

    text: str


ParserEvent = Content | Thought  # tool calls come with the first parser that reads some


class Parser(ABC):
    """Reads the text of one choice. A tag may be cut anywhere between two pieces.

    No event is empty, and nothing is lost but tags.
    """

    @abstractmethod
    def add(self, text: str) -> Sequence[ParserEvent]:
        """What can be told after this piece, which may be empty."""

    @abstractmethod
    def finish(self) -> Sequence[ParserEvent]:
        """What was held back: the text is over."""
