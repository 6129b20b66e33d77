"""Calls as JSON between tags, as Hermes and many models after it write them:

    <tool_call>
    {"name": "weather", "arguments": {"town": "Rome"}}
    </tool_call>

What is no such object stays content, with its tags. A name that no function has is passed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from pipeline.parsers.base import Json, Parser, Tool, ToolForm
from pipeline.parsers.calls import CallParser
from pipeline.parsers.json_call import JsonCall
from pipeline.parsers.tags import MAX_BLANKS, first_of, may_begin, overlap

BEGIN, END = "<tool_call>", "</tool_call>"
# A model that lost count of its brackets closes some too many.
BEHIND_OBJECT = re.compile(rf"[\s}}\]]{{0,{MAX_BLANKS}}}")


class HermesParser(CallParser):
    def __init__(self) -> None:
        super().__init__()
        self._call = JsonCall()
        self._is_begun, self._num_told = False, 0

    def _content(self) -> bool:
        found = first_of(self._held, (BEGIN,))
        if found is None:
            kept = len(self._held) - overlap(self._held, (BEGIN,))
            self._tell(self._held[:kept])
            self._held = self._held[kept:]
            return False
        self._tell(self._held[: found.start])
        self._held = self._held[found.stop :]
        self._call, self._is_begun, self._num_told = JsonCall(), False, 0
        self._state = self._object
        return True

    def _object(self) -> bool:
        """In a call."""
        call = self._call
        call.add(self._held)
        self._held = ""
        self._tell_call()
        if call.stop is not None and self._is_begun:
            if not call.arguments:
                self._tell_arguments("{}")
            return self._go_on(call.stop, self._behind_object)
        rest = call.text[call.read_to :]
        is_closed = not call.is_in_string and rest.startswith(END)
        if is_closed and self._is_begun:
            return self._go_on(call.read_to + len(END), self._content)
        is_waiting = call.stop is None and (not rest or call.is_in_string or may_begin(rest, (END,)))
        if call.is_broken or not is_waiting:
            return self._give_up()
        return False

    def _give_up(self) -> bool:
        """This is no call."""
        if self._is_begun:
            return self._go_on(self._call.read_to, self._behind_object)
        self._tell(BEGIN)
        return self._go_on(0, self._content)

    def _go_on(self, place: int, state: Callable[[], bool]) -> bool:
        self._held, self._state = self._call.text[place:], state
        return True

    def _behind_object(self) -> bool:
        found = BEHIND_OBJECT.match(self._held)
        rest = self._held[found.end() :] if found else self._held
        if rest.startswith(END):
            self._held = rest[len(END) :]
        elif not rest or may_begin(rest, (END,)):
            return False
        self._state = self._content
        return True

    def _tell_call(self) -> None:
        call = self._call
        if not self._is_begun and call.name is not None:
            self._is_begun = True
            self._begin_call(call.name)
        if self._is_begun:
            self._tell_arguments(call.arguments[self._num_told :])
            self._num_told = len(call.arguments)

    def _end(self) -> None:
        if self._state == self._content:
            self._tell(self._held)
        elif self._state == self._object and not self._is_begun:
            self._tell(BEGIN + self._call.text)
        self._held = ""


class HermesForm(ToolForm):
    names = ("hermes",)
    tags = (BEGIN, END)
    begin, separator = f"{BEGIN}\n", "\n"
    is_fallback = True

    def fits(self, template: str) -> bool:
        return BEGIN in template and "<function=" not in template

    def parser(self, tools: Sequence[Tool]) -> Parser:
        return HermesParser()

    def call_tag(self, tool: Tool) -> Json:
        begin = f'{BEGIN}\n{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        content = {"type": "json_schema", "json_schema": dict(tool.parameters) or {"type": "object"}}
        return {"type": "tag", "begin": begin, "content": content, "end": f"}}\n{END}"}


FORM = HermesForm()
