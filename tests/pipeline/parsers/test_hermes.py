from __future__ import annotations

import json

import pytest

from pipeline.parsers.base import ToolArguments
from pipeline.parsers.hermes import HermesParser
from tests.pipeline.parsers.reading import Read, check, pieces_of, read


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ODD = (
    '{"code": "if a < b: print(\\"}</tool_call>{\\")\\n", "é": ["{", {"x": [1, 2.50e1, null]}], '
    '"🙂": "\\u00e9\\\\"}'
)
TEXTS = {
    "no call": ("Hello, <you> & <tool.\n\n  ", Read("Hello, <you> & <tool.\n\n  ", [])),
    "blanks only": (" \n", Read(" \n", [])),
    "a call": (call("f", '{"a": 1}'), Read("", [("f", '{"a": 1}')])),
    "text before": ("Let me see.\n" + call("f", "{}"), Read("Let me see.", [("f", "{}")])),
    "text around": ("A " + call("f", "{}") + "\n\nB \n", Read("AB \n", [("f", "{}")])),
    "two calls": (call("f", "{}") + "\n" + call("g", ODD) + "\n", Read("", [("f", "{}"), ("g", ODD)])),
    "calls without a break": (call("f", "{}") + call("g", "{}"), Read("", [("f", "{}"), ("g", "{}")])),
    "odd strings": (call("f", ODD), Read("", [("f", ODD)])),
    "blanks in the object": (
        '<tool_call>{ "name" :"f" ,\n "arguments" : {"a": [1 , 2] } \n} </tool_call>',
        Read("", [("f", '{"a": [1 , 2] }')]),
    ),
    "arguments first": (
        '<tool_call>\n{"arguments": {"a": "b"}, "name": "f"}\n</tool_call>', Read("", [("f", '{"a": "b"}')])
    ),
    "further keys": (
        '<tool_call>{"id": "name", "x": {"name": "g", "arguments": 3}, "name": "f", "arguments": {"b": 2}, '
        '"y": 1}</tool_call>',
        Read("", [("f", '{"b": 2}')]),
    ),
    "no arguments": ('<tool_call>\n{"name": "f"}\n</tool_call>', Read("", [("f", "{}")])),
    "arguments that are a string": (call("f", '"a b"'), Read("", [("f", '"a b"')])),
    "arguments that are a number": (call("f", "12"), Read("", [("f", "12")])),
    "a name with quotes": (
        '<tool_call>{"name": "a\\"\\u00e9", "arguments": {}}</tool_call>', Read("", [('a"é', "{}")])
    ),
    "no JSON": ("<tool_call>\nhello\n</tool_call> x", Read("<tool_call>\nhello\n</tool_call> x", [])),
    "Python, no JSON": (
        "<tool_call>{'name': 'f'}</tool_call>", Read("<tool_call>{'name': 'f'}</tool_call>", [])
    ),
    "no name": ('<tool_call>{"a": 1}</tool_call>', Read('<tool_call>{"a": 1}</tool_call>', [])),
    "nothing in it": ("a<tool_call></tool_call>", Read("a<tool_call></tool_call>", [])),
    "a call in a broken call": (
        "<tool_call>oh " + call("f", "{}"), Read("<tool_call>oh", [("f", "{}")])
    ),
    "too many brackets": (call("f", "{}}") + " x", Read("x", [("f", "{}")])),
    "a bracket too few": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\nx', Read("x", [("f", '{"a": 1}')])
    ),
    "two brackets too few": (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1\n</tool_call>\nx', Read("x", [("f", '{"a": 1\n')])
    ),
    "no closing tag": ('<tool_call>\n{"name": "f", "arguments": {}}\nSo.', Read("So.", [("f", "{}")])),
    "a call behind no closing tag": (
        '<tool_call>{"name": "f", "arguments": {}}\n' + call("g", "{}"), Read("", [("f", "{}"), ("g", "{}")])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read_wherever_they_are_cut(name: str) -> None:
    text, expected = TEXTS[name]
    check(HermesParser, text, expected)


@pytest.mark.parametrize("stop", range(len(call("f", ODD))))
def test_an_answer_may_end_in_a_call(stop: int) -> None:
    """The name is told as soon as it is there, and all of the arguments that were written."""
    text = call("weather", ODD)[:stop]
    wholes = [read(HermesParser(), pieces) for pieces in (list(text), [text])]
    assert wholes[0] == wholes[1]
    ((told),) = wholes[:1]
    if told.calls:
        assert told.content == ""
        ((name, arguments),) = told.calls
        assert name == "weather"
        written = text.partition('"arguments": ')[2]
        assert ODD.startswith(arguments)
        assert arguments in (ODD, written, written[:-1])
    else:
        assert told.content == text


def test_arguments_come_as_they_are_written() -> None:
    parser = HermesParser()
    text = call("f", '{"text": "' + "word " * 50 + '"}')
    told = [event for piece in text for event in parser.add(piece) if isinstance(event, ToolArguments)]
    assert len(told) > 200
    json.loads("".join(event.text for event in told))


def test_content_is_not_held_longer_than_it_could_be_a_tag() -> None:
    parser = HermesParser()
    told = ["".join(getattr(event, "text", "") for event in parser.add(piece)) for piece in "a <too b"]
    assert told == ["a", "", "", "", "", "", " <too", " b"]


def test_a_long_call_takes_time_by_its_length() -> None:
    text = call("f", '{"a": "' + "x" * 200_000 + '"}')
    assert read(HermesParser(), [text[at : at + 4] for at in range(0, len(text), 4)]).calls[0][1] in text


def test_the_pieces_are_whole() -> None:
    assert all("".join(pieces) == ODD for pieces in pieces_of(ODD))
