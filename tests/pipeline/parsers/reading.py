"""Feeds texts to parsers in pieces, and puts together what they tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tokenizers import Tokenizer

from launcher.checkpoints import EMBEDDED
from pipeline.parsers.base import Content, Parser, ParserEvent, Thought, ToolArguments, ToolCallBegun

TOKENIZER = Tokenizer.from_file(str(EMBEDDED / "model" / "tokenizer.json"))


class Read(NamedTuple):
    content: str
    calls: list[tuple[str, str]]  # name, arguments
    thought: str = ""


def together(events: Iterable[ParserEvent]) -> Read:
    content, thought = "", ""
    calls: list[tuple[str, str]] = []
    for event in events:
        match event:
            case Content(text):
                content += text
            case Thought(text):
                thought += text
            case ToolCallBegun(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ToolArguments(index, text):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + text)
        assert isinstance(event, ToolCallBegun) or event.text, "no event is empty"
    return Read(content, calls, thought)


def read(parser: Parser, pieces: Iterable[str]) -> Read:
    events = [event for piece in pieces for event in parser.add(piece)]
    return together([*events, *parser.finish()])


def pieces_of(text: str) -> Iterator[list[str]]:
    """The text as a whole, in characters, in tokens, and cut in two at each place."""
    yield [text]
    yield list(text)
    offsets = TOKENIZER.encode(text, add_special_tokens=False).offsets
    yield [
        text[start:stop]
        for start, stop in zip(
            [0, *(one[0] for one in offsets[1:])], [*(one[0] for one in offsets[1:]), len(text)], strict=True
        )
    ]
    for cut in range(1, len(text)):
        yield [text[:cut], text[cut:]]


def check(make: Callable[[], Parser], text: str, expected: Read) -> None:
    for pieces in pieces_of(text):
        assert read(make(), pieces) == expected, pieces
