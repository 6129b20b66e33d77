"""What parsers of calls share: content around calls, without the blanks next to them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

from pipeline.parsers.base import Content, Parser, ParserEvent, ToolArguments, ToolCallBegun
from pipeline.parsers.tags import TrailingBlanks


class CallParser(Parser):
    """A machine of states: `_state` takes what it can from the front of `_held`, appends events to `_events`,
    and says whether it got further."""

    def __init__(self) -> None:
        self._held = ""
        self._events: list[ParserEvent] = []
        self._blanks = TrailingBlanks()  # of the content
        self._is_behind_call = False
        self._state: Callable[[], bool] = self._content
        self._num_calls = 0

    def add(self, text: str) -> Sequence[ParserEvent]:
        self._held += text
        while self._state():
            pass
        return self._take_events()

    def finish(self) -> Sequence[ParserEvent]:
        self._end()
        if (blanks := self._blanks.take()) and not self._is_behind_call:
            self._events.append(Content(blanks))
        return self._take_events()

    @abstractmethod
    def _content(self) -> bool:
        """The state outside of calls."""

    @abstractmethod
    def _end(self) -> None:
        """Tells what is held: the text is over."""

    def _take_events(self) -> Sequence[ParserEvent]:
        events, self._events = self._events, []
        return events

    def _tell(self, text: str) -> None:
        """Content, whose blanks at the end are held back, and whose blanks behind a call are dropped."""
        told = self._blanks.add(text)
        if self._is_behind_call:
            told = told.lstrip()
        if told:
            self._is_behind_call = False
            self._events.append(Content(told))

    def _begin_call(self, name: str) -> None:
        self._blanks.take()
        self._is_behind_call = True
        self._events.append(ToolCallBegun(self._num_calls, name))
        self._num_calls += 1

    def _tell_arguments(self, text: str) -> None:
        """Of the last call that has begun."""
        if text:
            self._events.append(ToolArguments(self._num_calls - 1, text))
