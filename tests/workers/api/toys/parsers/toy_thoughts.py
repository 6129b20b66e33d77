"""A parser of the tests: what stands between <think> and </think> is a thought."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.parsers.base import Parser, ParserEvent, Thought, ThoughtForm, ThoughtStart

TAGS = {False: "<think>", True: "</think>"}  # the next one, by whether the text is a thought


class ThoughtParser(Parser):
    def __init__(self, inner: Parser) -> None:
        self._inner, self._held, self._is_thought = inner, "", False

    def add(self, text: str) -> Sequence[ParserEvent]:
        events: list[ParserEvent] = []
        self._held += text
        while (tag := TAGS[self._is_thought]) in self._held:
            before, _, self._held = self._held.partition(tag)
            events += self._told(before)
            self._is_thought = not self._is_thought
        # The end may begin a tag.
        num_kept = max(n for n in range(len(tag)) if self._held.endswith(tag[:n]))
        told, self._held = self._held[: len(self._held) - num_kept], self._held[len(self._held) - num_kept :]
        return events + self._told(told)

    def finish(self) -> Sequence[ParserEvent]:
        told, self._held = self._held, ""
        return [*self._told(told), *self._inner.finish()]

    def _told(self, text: str) -> list[ParserEvent]:
        if self._is_thought:
            return [Thought(text)] if text else []
        return list(self._inner.add(text))


class ToyThoughts(ThoughtForm):
    names = ("toy",)
    tags = (TAGS[False], TAGS[True])
    begin, end = tags

    def fits(self, template: str) -> bool:
        return False

    def parser(self, start: ThoughtStart, inner: Parser, ends: Sequence[str] = ()) -> Parser:
        return ThoughtParser(inner)


FORM = ToyThoughts()
