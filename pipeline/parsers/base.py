"""The contract of what a model writes in a chat: the text of one choice, piece by piece, becomes content,
thoughts, and calls of functions."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

Json = dict[str, Any]


class Content(msgspec.Struct, frozen=True):
    """Text of the answer."""

    text: str


class Thought(msgspec.Struct, frozen=True):
    """Text that the model writes before it answers."""

    text: str


class ToolCallBegun(msgspec.Struct, frozen=True):
    """The model calls a function. `index` counts the calls of a choice."""

    index: int
    name: str


class ToolArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments: all of a call's texts together are the JSON that the model means."""

    index: int
    text: str


ParserEvent = Content | Thought | ToolCallBegun | ToolArguments


class Parser(ABC):
    """Reads the text of one choice. A tag may be cut anywhere between two pieces.

    No event is empty, and nothing is lost but tags, and blanks next to them.
    """

    @abstractmethod
    def add(self, text: str) -> Sequence[ParserEvent]:
        """What can be told after this piece, which may be empty."""

    @abstractmethod
    def finish(self) -> Sequence[ParserEvent]:
        """What was held back: the text is over."""


class Tool(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = {}  # JSON schema of its arguments
    is_strict: bool = False  # the arguments must follow the schema


class ThoughtStart(enum.Enum):
    """Where the prompt leaves the model."""

    THOUGHT = enum.auto()  # in a thought that the prompt has opened
    EXPECTED = enum.auto()  # before a thought that it will open, or forget to
    EITHER = enum.auto()  # it may open a thought
    CONTENT = enum.auto()  # behind the thoughts


class ToolForm(ABC):
    """A form of calls: its module names one in `FORM`."""

    names: ClassVar[tuple[str, ...]]  # on the command line
    tags: ClassVar[tuple[str, ...]]  # never left out of the text, even where they are special tokens
    begin: ClassVar[str]  # of every call
    separator: ClassVar[str]  # between two calls
    is_fallback: ClassVar[bool] = (
        False  # of models whose template shows no form: a grammar can make them call
    )

    @abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a model with this chat template writes calls in this form."""

    @abstractmethod
    def parser(self, tools: Sequence[Tool]) -> Parser: ...

    @abstractmethod
    def call_tag(self, tool: Tool) -> Json:
        """xgrammar's format of one call, a `tag` that begins with `begin`."""


class ThoughtForm(ABC):
    """A form of thoughts: its module names one in `FORM`."""

    names: ClassVar[tuple[str, ...]]
    tags: ClassVar[tuple[str, ...]]
    begin: ClassVar[str]
    end: ClassVar[str]

    @abstractmethod
    def fits(self, template: str) -> bool:
        """Whether a model with this chat template writes thoughts in this form."""

    @abstractmethod
    def parser(self, start: ThoughtStart, inner: Parser, ends: Sequence[str] = ()) -> Parser:
        """`inner` reads what is no thought. A thought ends before one of `ends`, too."""
