"""Reads an object with a function's name and its arguments from JSON that is still being written."""

from __future__ import annotations

import json
import re

INTERESTING = re.compile(r'["\\{}\[\],:<]|[^\s"\\{}\[\],:<]+')
IN_STRING = re.compile(r'["\\]')


class JsonCall:
    """`text` is all that was written. `name` is None until it is known; `arguments` is what of their JSON is
    certain. `stop` is the place behind the object, or None; `is_broken` says that this is no such object.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.stop: int | None = None
        self.is_broken = False
        self._at = self._depth = 0
        self._string_from: int | None = None
        self._key: str | None = None
        self._value_from: int | None = None  # of the key, in the outermost object
        self._arguments_from: int | None = None
        self._arguments_to: int | None = None

    @property
    def arguments(self) -> str:
        """A number may have more digits: it is told when it is over."""
        start, stop = self._arguments_from, self._arguments_to
        if start is None or (stop is None and self.text[start] not in '"{['):
            return ""
        return self.text[start : self._at if stop is None else stop]

    @property
    def is_in_string(self) -> bool:
        return self._string_from is not None

    @property
    def read_to(self) -> int:
        return self._at

    def add(self, text: str) -> None:
        """Reads as far as the object goes, or to a `<` outside of strings, which JSON does not have."""
        self.text += text
        while self._at < len(self.text) and self.stop is None and not self.is_broken:
            if not (self._read_string() if self._string_from is not None else self._read_sign()):
                return

    def _read_string(self) -> bool:
        """In a string. Says whether more can be read."""
        assert self._string_from is not None
        found = IN_STRING.search(self.text, self._at)
        if found is None:
            self._at = len(self.text)
        elif found.group() == '"':
            self._at = found.end()
            self._end_string(self._string_from)
        elif found.end() == len(self.text):
            self._at = found.start()
            return False  # what is escaped is still to come
        else:
            self._at = found.end() + 1
        return True

    def _end_string(self, start: int) -> None:
        self._string_from = None
        if self._depth != 1:
            return
        if self._key is not None and self._key != "name":
            self._end_nested(self._at)
            return
        try:
            value = json.loads(self.text[start : self._at], strict=False)
        except ValueError:
            self.is_broken = True
            return
        if self._key is None:
            self._key = value
        elif self._value_from == start:
            self.name = value

    def _read_sign(self) -> bool:
        found = INTERESTING.search(self.text, self._at)
        if found is None:
            self._at = len(self.text)
            return True
        sign, place = found.group()[0], found.start()
        if sign == "<":
            self._at = place
            return False
        self._at = found.end()
        if self._depth == 0 and sign != "{":
            self.is_broken = True
        elif sign in "}]":
            self._close(place)
        elif self._depth == 1 and sign == ",":
            self._end_value(place)
        elif self._depth == 1 and sign == ":":
            self.is_broken = self._key is None
        elif self._depth == 1 and self._key is None and sign != '"':
            self.is_broken = True
        else:
            self._open(sign, place)
        return True

    def _open(self, sign: str, place: int) -> None:
        """A value begins, or goes on."""
        if self._depth == 1 and self._key is not None and self._value_from is None:
            self._value_from = place
            if self._key == "arguments":
                self._arguments_from = place
        if sign == '"':
            self._string_from = place
        elif sign in "{[":
            self._depth += 1

    def _close(self, place: int) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._end_value(place)
            self.stop = place + 1
        elif self._depth == 1:
            self._end_nested(place + 1)

    def _end_nested(self, place: int) -> None:
        """A value of the outermost object ends with its own sign."""
        if self._key == "arguments" and self._arguments_to is None:
            self._arguments_to = place

    def _end_value(self, place: int) -> None:
        if self._key == "arguments" and self._arguments_from is not None and self._arguments_to is None:
            value = self.text[self._arguments_from : place]
            self._arguments_to = self._arguments_from + len(value.rstrip())
        self._key = self._value_from = None
