"""Thoughts between <think> and </think>, before the answer.

The prompt may have opened the thought already, and a model may forget the opening tag. Blanks next to the
tags are not the thought's: chat templates write them again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.parsers.base import Parser, ParserEvent, Thought, ThoughtForm, ThoughtStart
from pipeline.parsers.tags import MAX_BLANKS, TrailingBlanks, first_of, may_begin, overlap

BEGIN, END = "<think>", "</think>"


class ThoughtParser(Parser):
    def __init__(self, start: ThoughtStart, inner: Parser, ends: Sequence[str]) -> None:
        self._inner, self._ends = inner, (END, *ends)
        self._may_open = start is not ThoughtStart.CONTENT  # with a tag
        self._is_thought = start in (ThoughtStart.THOUGHT, ThoughtStart.EXPECTED)
        self._is_at_start = self._is_thought  # what comes are blanks so far
        self._held, self._blanks = "", TrailingBlanks()  # of the thought

    def add(self, text: str) -> Sequence[ParserEvent]:
        events: list[ParserEvent] = []
        self._held += text
        if self._may_open and not self._open():
            return events
        if self._is_thought:
            self._think(events)
        if not self._is_thought:
            self._pass_on(events)
        return events

    def finish(self) -> Sequence[ParserEvent]:
        events: list[ParserEvent] = []
        if self._is_thought:
            self._tell(self._held, events)
        elif self._held:
            events += self._inner.add(self._held)
        self._held = ""
        return [*events, *self._inner.finish()]

    def _open(self) -> bool:
        """Takes the opening tag, if it is there. Says whether that is known."""
        begun = self._held.lstrip()
        if may_begin(begun, (BEGIN,)) and len(self._held) - len(begun) <= MAX_BLANKS:
            return False
        self._may_open = False
        if begun.startswith(BEGIN):
            self._held = begun[len(BEGIN) :]
            self._is_thought = self._is_at_start = True
        return True

    def _think(self, events: list[ParserEvent]) -> None:
        found = first_of(self._held, self._ends)
        if found is None:
            certain = len(self._held) - overlap(self._held, self._ends)
            self._tell(self._held[:certain], events)
            self._held = self._held[certain:]
            return
        self._tell(self._held[: found.start], events)
        self._held = self._held[found.stop if found.tag == END else found.start :]
        self._is_thought, self._is_at_start = False, True

    def _tell(self, text: str, events: list[ParserEvent]) -> None:
        text = self._blanks.add(text)
        if self._is_at_start:
            text = text.lstrip()
        if text:
            self._is_at_start = False
            events.append(Thought(text))

    def _pass_on(self, events: list[ParserEvent]) -> None:
        text = self._held.lstrip() if self._is_at_start else self._held
        self._held = ""
        if text:
            self._is_at_start = False
            events += self._inner.add(text)


class TaggedThoughts(ThoughtForm):
    names = ("qwen3",)
    tags = (BEGIN, END)
    begin, end = BEGIN, END

    def fits(self, template: str) -> bool:
        return END in template

    def parser(self, start: ThoughtStart, inner: Parser, ends: Sequence[str] = ()) -> Parser:
        return ThoughtParser(start, inner, ends)


FORM = TaggedThoughts()
