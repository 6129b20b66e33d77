"""Calls in tags, as Qwen3-Coder and Qwen3.5 write them:

    <tool_call>
    <function=weather>
    <parameter=town>
    Rome
    </parameter>
    </function>
    </tool_call>

The values are texts: the function's schema says which of them are numbers, objects and so on. Their JSON is
told as it comes. A parameter that the schema does not have is a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.parsers.base import Json, Parser, Tool, ToolForm
from pipeline.parsers.calls import CallParser
from pipeline.parsers.tags import MAX_BLANKS, first_of, may_begin, overlap

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
# A model that forgets the end of a value goes on in a new line.
VALUE_ENDS = (PARAMETER_END, f"\n{PARAMETER}", f"\n{FUNCTION_END}", f"\n{END}")
CUT_ENDS = (*VALUE_ENDS, f"\n{PARAMETER_END}")
MAX_BLANKS_BETWEEN = 2  # between two tags: a model that is made to call could write blanks for ever
MAX_NAME = 256  # characters; what is longer is no name
STRING, ANY = frozenset({"string"}), frozenset({"any"})


class XmlParser(CallParser):
    def __init__(self, tools: Sequence[Tool]) -> None:
        super().__init__()
        self._tools = {tool.name: tool for tool in tools}
        self._tool = Tool("")
        self._opened = ""  # the tags of a call that has not begun yet
        self._types = STRING  # of the parameter
        self._num_parameters = 0
        self._is_at_start = False  # of a value
        self._num_searched = 0  # characters of it: no tag begins in them

    def _content(self) -> bool:
        found = first_of(self._held, (BEGIN, FUNCTION))
        if found is None:
            kept = len(self._held) - overlap(self._held, (BEGIN, FUNCTION))
            self._tell(self._held[:kept])
            self._held = self._held[kept:]
            return False
        self._tell(self._held[: found.start])
        self._opened = found.tag
        self._held = self._held[found.stop :]
        self._state = self._function if found.tag == FUNCTION else self._before_function
        return True

    def _before_function(self) -> bool:
        rest = self._held.lstrip()
        if rest.startswith(FUNCTION):
            self._opened += self._held[: len(self._held) - len(rest)] + FUNCTION
            self._held = rest[len(FUNCTION) :]
            self._state = self._function
            return True
        if may_begin(rest, (FUNCTION,)) and len(self._held) - len(rest) <= MAX_BLANKS:
            return False
        return self._give_up()

    def _function(self) -> bool:
        """In the name."""
        name, is_over, rest = self._held.partition(">")
        if "\n" in name or "<" in name or len(name) > MAX_NAME or (is_over and not name):
            return self._give_up()
        if not is_over:
            return False
        self._held = rest
        self._begin_call(name)
        self._tool = self._tools.get(name, Tool(name))
        self._num_parameters = 0
        self._state = self._between
        return True

    def _give_up(self) -> bool:
        """This is no call."""
        self._tell(self._opened)
        self._state = self._content
        return True

    def _between(self) -> bool:
        """In a call, outside of its parameters. What is no tag has no meaning there."""
        tags = (PARAMETER, FUNCTION_END, END)
        found = first_of(self._held, tags)
        if found is None:
            self._held = self._held[len(self._held) - overlap(self._held, tags) :]
            return False
        if found.tag == PARAMETER:
            name, is_over, rest = self._held[found.stop :].partition(">")
            if not is_over and len(name) <= MAX_NAME:
                return False
            self._held = rest
            self._begin_parameter(name)
            return True
        self._held = self._held[found.stop :]
        self._tell_arguments("}" if self._num_parameters else "{}")
        self._state = self._behind_function if found.tag == FUNCTION_END else self._content
        return True

    def _begin_parameter(self, name: str) -> None:
        properties = self._tool.parameters.get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        self._types = _types_of(schema)
        key = json.dumps(name, ensure_ascii=False)
        self._tell_arguments(f"{', ' if self._num_parameters else '{'}{key}: ")
        if self._types == STRING:
            self._tell_arguments('"')
        self._num_parameters += 1
        self._is_at_start, self._num_searched = True, 0
        self._state = self._value

    def _value(self) -> bool:
        if self._is_at_start and self._held:
            self._held = self._held.removeprefix("\n")
            self._is_at_start = False
        found = first_of(self._held, VALUE_ENDS, self._num_searched)
        if found is not None:
            value, is_ended = self._held[: found.start], found.tag == PARAMETER_END
            self._held = self._held[found.stop if is_ended else found.start :]
            self._end_value(value.removesuffix("\n") if is_ended else value)
            self._state = self._between
            return True
        if self._types == STRING:
            kept = len(self._held) - overlap(self._held, CUT_ENDS)
            self._tell_arguments(_in_string(self._held[:kept]))
            self._held = self._held[kept:]
        else:
            self._num_searched = max(0, len(self._held) - max(map(len, VALUE_ENDS)) + 1)
        return False

    def _end_value(self, value: str) -> None:
        if self._types == STRING:
            self._tell_arguments(_in_string(value) + '"')
        else:
            self._tell_arguments(_to_json(value, self._types))

    def _behind_function(self) -> bool:
        self._held = rest = self._held.lstrip()  # blanks behind a call are dropped, whatever follows them
        if rest.startswith(END):
            self._held = rest[len(END) :]
        elif may_begin(rest, (END,)):
            return False
        self._state = self._content
        return True

    def _end(self) -> None:
        if self._state == self._content:
            self._tell(self._held)
        elif self._state in (self._before_function, self._function):
            self._tell(self._opened + self._held)
        elif self._state == self._value:
            written = self._held[: len(self._held) - overlap(self._held, CUT_ENDS)]
            self._tell_arguments(_in_string(written) if self._types == STRING else written)
        self._held = ""


def _in_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _types_of(schema: Any) -> frozenset[str]:
    """The types that a value may have: a string only, where the schema says nothing."""
    if not isinstance(schema, Mapping):
        return STRING
    given = schema.get("type")
    types = {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
    for name in ("anyOf", "oneOf", "allOf"):
        for one in _list_of(schema, name):
            types |= _types_of(one)
    listed = [*_list_of(schema, "enum"), *([schema["const"]] if "const" in schema else ())]
    if not types and listed:
        types |= {"string" if isinstance(value, str) else "any" for value in listed}
    if "$ref" in schema:
        types |= ANY
    return frozenset(types) or STRING


def _list_of(schema: Mapping[str, Any], name: str) -> list[Any]:
    """Nobody has checked the schema of a function that is not forced."""
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _to_json(text: str, types: frozenset[str]) -> str:
    """The value's JSON; a string where the text is not of the types."""
    if text.strip().lower() in ("true", "false") and types & {"boolean", "any"}:
        return text.strip().lower()
    if text.strip().lower() in ("null", "none"):
        return "null"
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if isinstance(value, str) and "string" not in types:
        return text.strip()
    return text.strip() if _fits(value, types) else json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _fits(value: Any, types: frozenset[str]) -> bool:
    """Where a string is allowed, too, only what the other types allow is not one."""
    if "any" in types or not types & {"string"}:
        return True
    kinds = {
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
    }
    return any(kinds.get(kind, False) for kind in types)


class XmlForm(ToolForm):
    names = ("qwen3_xml", "qwen3_coder")
    tags = (BEGIN, END)
    begin, separator = f"{BEGIN}\n{FUNCTION}", "\n"

    def fits(self, template: str) -> bool:
        return FUNCTION in template and PARAMETER in template

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return XmlParser(tools)

    def call_tag(self, tool: Tool) -> Json:
        schema = dict(tool.parameters) or {"type": "object", "properties": {}}
        content = {
            "type": "json_schema",
            "json_schema": schema,
            "style": "qwen_xml",
            "max_whitespace_cnt": MAX_BLANKS_BETWEEN,
        }
        end = f"\n{FUNCTION_END}\n{END}"
        return {"type": "tag", "begin": f"{self.begin}{tool.name}>\n", "content": content, "end": end}


FORM = XmlForm()
