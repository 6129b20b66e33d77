"""What a model writes in a chat, by its chat template: which parser reads it, and where it begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.families.chat_template import ChatTemplate
from pipeline.parsers.base import Parser, ThoughtForm, ThoughtStart, Tool, ToolForm
from pipeline.parsers.plain import PlainParser
from pipeline.parsers.registry import AUTO, find_thought_form, find_tool_form
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import Chat, Prompt, TextPart

THINKING = "enable_thinking"  # the option by which templates let a model think, or not
MAX_STARTS = 256  # remembered ones
PROBE = {"role": "user", "content": "Hello"}


class ChatForms:
    """`tool_parser` and `reasoning_parser` name forms: auto is what the template shows, none is plain text.

    Raises ValueError for an unknown name.
    """

    def __init__(
        self, template: ChatTemplate | None, tool_parser: str = AUTO, reasoning_parser: str = AUTO
    ) -> None:
        source = template.source if template else ""
        self._template = template
        self.calls: ToolForm | None = find_tool_form(tool_parser, source)
        self.thoughts: ThoughtForm | None = find_thought_form(reasoning_parser, source)
        self._starts: dict[str, ThoughtStart] = {}

    @classmethod
    def read(cls, folder: Path, tool_parser: str = AUTO, reasoning_parser: str = AUTO) -> ChatForms:
        """Of a checkpoint."""
        return cls(ChatTemplate.read(folder), tool_parser, reasoning_parser)

    def parser(self, prompt: Prompt) -> Parser:
        return self.parser_maker(prompt)()

    def parser_maker(self, prompt: Prompt) -> Callable[[], Parser]:
        """Makes the parsers of all choices: the functions are read once, as there may be megabytes of them.

        A prompt without a chat's template is continued, not answered: nothing in it is more than text.
        """
        if not isinstance(prompt, Chat):
            return PlainParser
        calls, thoughts = self.calls if prompt.tools else None, self.thoughts
        make_inner = partial(calls.parser, tools_of(prompt)) if calls else PlainParser
        if thoughts is None:
            return make_inner
        start, ends = self.start(prompt), (calls.tags[0],) if calls else ()
        return lambda: thoughts.parser(start, make_inner(), ends)

    def knows(self, option: str) -> bool:
        """Whether the template reads this option."""
        return self._template is not None and option in self._template.variables()

    def start(self, chat: Chat) -> ThoughtStart:
        """Where the prompt leaves the model."""
        if self.thoughts is None:
            return ThoughtStart.CONTENT
        if chat.continue_final_message:
            return self._start_in(_final_text(chat), ThoughtStart.CONTENT)
        if not chat.add_generation_prompt:
            return ThoughtStart.EITHER
        key = json.dumps(dict(chat.template_options), sort_keys=True)
        if key not in self._starts:
            if len(self._starts) >= MAX_STARTS:
                self._starts.clear()
            self._starts[key] = self._probe(chat.template_options)
        return self._starts[key]

    def _probe(self, options: Mapping[str, Any]) -> ThoughtStart:
        found = self._start_in(self._generation_prompt(options), ThoughtStart.EITHER)
        if found is ThoughtStart.EITHER and self.knows(THINKING):
            without = self._generation_prompt({**options, THINKING: False})
            if self._start_in(without, ThoughtStart.EITHER) is ThoughtStart.CONTENT:
                return ThoughtStart.EXPECTED
        return found

    def _start_in(self, text: str, otherwise: ThoughtStart) -> ThoughtStart:
        assert self.thoughts is not None
        begin, end = text.rfind(self.thoughts.begin), text.rfind(self.thoughts.end)
        if begin == end:
            return otherwise
        return ThoughtStart.THOUGHT if begin > end else ThoughtStart.CONTENT

    def _generation_prompt(self, options: Mapping[str, Any]) -> str:
        """What the template writes for the model to go on with."""
        if self._template is None:
            return ""
        try:
            whole = self._template.render([PROBE], (), options)
            before = self._template.render([PROBE], (), options, add_generation_prompt=False)
        except RequestError:
            return ""
        return whole.removeprefix(before)


def tools_of(chat: Chat) -> list[Tool]:
    """The functions of a chat, as far as they can be read: preprocess refuses what is none."""
    try:
        given = json.loads(chat.tools) if chat.tools else []
    except (ValueError, RecursionError):
        return []
    functions = [tool.get("function") for tool in given if isinstance(tool, dict)]
    return [to_tool(function) for function in functions if isinstance(function, dict)]


def to_tool(function: Mapping[str, Any]) -> Tool:
    parameters = function.get("parameters")
    return Tool(
        str(function.get("name")),
        parameters if isinstance(parameters, dict) else {},
        function.get("strict") is True,
    )


def _final_text(chat: Chat) -> str:
    content = chat.messages[-1].content if chat.messages else ""
    if isinstance(content, str):
        return content
    return "".join(part.text for part in content if isinstance(part, TextPart))
