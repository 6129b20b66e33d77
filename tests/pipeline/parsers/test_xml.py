from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.parsers.base import Parser, Tool, ToolArguments
from pipeline.parsers.xml import XmlParser
from tests.pipeline.parsers.reading import Read, check, read

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "b": {"type": "boolean"},
        "a": {"type": "array", "items": {}},
        "o": {"type": "object"},
        "opt": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "many": {"type": ["integer", "string"]},
        "ref": {"$ref": "#/$defs/x"},
        "word": {"enum": ["x", "1"]},
        "level": {"enum": [1, 2]},
        "any": {},
    },
}
TOOLS = (Tool("f", SCHEMA), Tool("bare"))


def make() -> Parser:
    return XmlParser(TOOLS)


def call(name: str, **values: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


def one(arguments: str, name: str = "f", content: str = "") -> Read:
    return Read(content, [(name, arguments)])


CODE = "if a < b and c:\n\n\tprint(\"}</tool_call>\" + '{')\n<parameter of=x>\\n é🙂"
TEXTS = {
    "no call": ("Hello, <you> & <tool.\n\n  ", Read("Hello, <you> & <tool.\n\n  ", [])),
    "no parameters": (call("bare"), one("{}", "bare")),
    "a string": (call("f", s="Rome"), one('{"s": "Rome"}')),
    "an empty string": ("<tool_call>\n<function=f>\n<parameter=s>\n</parameter>\n</function>\n</tool_call>",
                        one('{"s": ""}')),
    "a string with blank lines": (call("f", s="\n a\n\n"), one('{"s": "\\n a\\n\\n"}')),
    "code": (call("f", s=CODE), one(json.dumps({"s": CODE}, ensure_ascii=False))),
    "values of all types": (
        call("f", i="12", n="1.50", b="True", a='[1, "x"]', o='{"k": null}'),
        one('{"i": 12, "n": 1.50, "b": true, "a": [1, "x"], "o": {"k": null}}'),
    ),
    "values that do not fit": (
        call("f", i="twelve", b="yes", a="x, y"), one('{"i": "twelve", "b": "yes", "a": "x, y"}'),
    ),
    "null": (call("f", s="null", i="null", opt="None"), one('{"s": "null", "i": null, "opt": null}')),
    "strings that look like others": (
        call("f", opt="5", many="5", word="1", level="1", other="5", any="5", ref='{"x": 1}'),
        one('{"opt": "5", "many": 5, "word": "1", "level": 1, "other": "5", "any": "5", "ref": {"x": 1}}'),
    ),
    "an unknown function": (call("g", i="5", x="{}"), one('{"i": "5", "x": "{}"}', "g")),
    "text around": ("A\n\n" + call("bare") + "\n B \n", one("{}", "bare", "AB \n")),
    "two calls": (
        call("f", s="x") + "\n" + call("bare"), Read("", [("f", '{"s": "x"}'), ("bare", "{}")])
    ),
    "two functions in a call": (
        "<tool_call>\n<function=bare>\n</function>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n"
        "</tool_call>", Read("", [("bare", "{}"), ("f", '{"s": "x"}')])
    ),
    "no outer tag": ("Well.\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function>\n",
                     one('{"s": "x"}', "f", "Well.")),
    "values in one line": (
        "<tool_call><function=f><parameter=i>3</parameter><parameter=s>x</parameter></function></tool_call>",
        one('{"i": 3, "s": "x"}'),
    ),
    "values without an end": (
        "<tool_call>\n<function=f>\n<parameter=s>\nx\n<parameter=i>\n3\n</function>\n</tool_call>",
        one('{"s": "x", "i": 3}'),
    ),
    "no end of the function": ("<tool_call>\n<function=f>\n<parameter=i>\n3\n</parameter>\n</tool_call>",
                               one('{"i": 3}')),
    "no function": ("<tool_call>\nhello\n</tool_call>", Read("<tool_call>\nhello\n</tool_call>", [])),
    "JSON": ('<tool_call>{"name": "f"}</tool_call>', Read('<tool_call>{"name": "f"}</tool_call>', [])),
    "no name": ("<function=>x", Read("<function=>x", [])),
    "a name with a line break": ("<function=a\nb>x", Read("<function=a\nb>x", [])),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_read_wherever_they_are_cut(name: str) -> None:
    text, expected = TEXTS[name]
    check(make, text, expected)
    for _, arguments in expected.calls:
        json.loads(arguments)


WHOLE = call("f", s='a "b"\nc', i="12")


@pytest.mark.parametrize("stop", range(len(WHOLE)))
def test_an_answer_may_end_in_a_call(stop: int) -> None:
    text = WHOLE[:stop]
    told = read(make(), list(text))
    assert told == read(make(), [text])
    if told.calls:
        assert told.content == ""
        assert '{"s": "a \\"b\\"\\nc", "i": 12}'.startswith(told.calls[0][1].rstrip())
    else:
        assert told.content == text


def test_a_string_comes_as_it_is_written() -> None:
    parser = make()
    told = [event for sign in call("f", s="word " * 50) for event in parser.add(sign)]
    assert sum(isinstance(event, ToolArguments) for event in told) > 200


@pytest.mark.parametrize(
    "schema", [{"anyOf": 5}, {"enum": 5}, {"type": [["a"]]}, {"type": 5}, {"allOf": "x"}]
)
def test_a_schema_that_is_none_breaks_no_answer(schema: dict[str, Any]) -> None:
    """A function's schema is compiled, and so checked, only where calls are forced."""
    parser = XmlParser([Tool("f", {"properties": {"x": schema}})])
    assert read(parser, [call("f", x="1")]).calls[0][0] == "f"
