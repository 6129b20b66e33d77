"""An answer as a row of blocks, as Anthropic's and OpenAI's newer API show it: thoughts, text, calls."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from pipeline.parsers.base import Content, ParserEvent, Thought, ToolArguments, ToolCallBegun
from workers.api.answer import ChoiceAnswer


class BlockKind(enum.Enum):
    THOUGHT = enum.auto()
    TEXT = enum.auto()
    CALL = enum.auto()


@dataclass(slots=True)
class AnswerBlock:
    index: int
    kind: BlockKind
    name: str = ""  # of a call
    pieces: list[str] = field(default_factory=list)  # of its text, or of a call's arguments

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Opened(NamedTuple):
    block: AnswerBlock


class Grown(NamedTuple):
    block: AnswerBlock
    text: str


class Closed(NamedTuple):
    block: AnswerBlock


BlockEvent = Opened | Grown | Closed


class AnswerBlocks:
    """Follows the events of one choice. One block is open at a time."""

    def __init__(self) -> None:
        self.all: list[AnswerBlock] = []
        self._is_open = False

    def add(self, events: Sequence[ParserEvent]) -> Iterator[BlockEvent]:
        for event in events:
            match event:
                case Content(text):
                    yield from self._grow(BlockKind.TEXT, text)
                case Thought(text):
                    yield from self._grow(BlockKind.THOUGHT, text)
                case ToolCallBegun(_, name):
                    yield from self._open(BlockKind.CALL, name)
                case ToolArguments(_, text):
                    yield from self._grow(BlockKind.CALL, text)
                case _:
                    assert_never(event)

    def finish(self) -> Iterator[BlockEvent]:
        if self._is_open:
            self._is_open = False
            yield Closed(self.all[-1])

    def _open(self, kind: BlockKind, name: str = "") -> Iterator[BlockEvent]:
        yield from self.finish()
        self._is_open = True
        self.all.append(AnswerBlock(len(self.all), kind, name))
        yield Opened(self.all[-1])

    def _grow(self, kind: BlockKind, text: str) -> Iterator[BlockEvent]:
        if not self._is_open or self.all[-1].kind is not kind:
            yield from self._open(kind)
        self.all[-1].pieces.append(text)
        yield Grown(self.all[-1], text)


def blocks_of(choice: ChoiceAnswer) -> list[AnswerBlock]:
    """Of a whole answer. An answer without anything has an empty text."""
    found = [(BlockKind.THOUGHT, "", choice.thoughts)] if choice.thoughts else []
    if choice.content or not choice.calls:
        found.append((BlockKind.TEXT, "", choice.content))
    found += [(BlockKind.CALL, call.name, call.arguments) for call in choice.calls]
    return [AnswerBlock(index, *one) for index, one in enumerate(found)]
