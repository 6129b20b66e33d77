"""What a parser takes for a piece does not grow with the text: the endpoint parses in its event loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from pipeline.parsers.base import Parser, ThoughtStart, Tool
from pipeline.parsers.hermes import HermesParser
from pipeline.parsers.plain import PlainParser
from pipeline.parsers.thoughts import ThoughtParser
from pipeline.parsers.xml import XmlParser

NUM_PIECES = 32 << 10
MOST_S = 1.5  # measured: 0.5; where it grew with the text, 2 to 25
TOOL = Tool("f", {"properties": {"x": {"type": "array"}}})
BLANKS = " " * 8


def xml() -> Parser:
    return XmlParser([TOOL])


def thought(start: ThoughtStart) -> Callable[[], Parser]:
    return lambda: ThoughtParser(start, PlainParser(), ())


@pytest.mark.parametrize(
    ("make", "head", "piece"),
    [
        (xml, "<tool_call>\n<function=f>\n<parameter=x>\n", "1, 22,"),
        (xml, "<tool_call>", BLANKS),
        (xml, "<tool_call><function=f></function>", BLANKS),
        (xml, "text", BLANKS),
        (HermesParser, "text", BLANKS),
        (HermesParser, '<tool_call>{"name": "f", "arguments": {}}', "}       "),
        (thought(ThoughtStart.THOUGHT), "text", BLANKS),
        (thought(ThoughtStart.EITHER), "", BLANKS),
    ],
)
def test_a_long_answer_takes_no_longer_for_a_piece(make: Callable[[], Parser], head: str, piece: str) -> None:
    parser = make()
    parser.add(head)
    started = time.process_time()
    for _ in range(NUM_PIECES):
        parser.add(piece)
    assert time.process_time() - started < MOST_S
