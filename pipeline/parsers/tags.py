"""Finds tags that may be cut anywhere between two pieces of a text, and holds back blanks next to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Found(NamedTuple):
    start: int
    tag: str

    @property
    def stop(self) -> int:
        return self.start + len(self.tag)


MAX_BLANKS = 256  # held in front of a tag: more would be read again with each piece


class TrailingBlanks:
    """Holds back the blanks at the end of a text until more of it comes."""

    def __init__(self) -> None:
        self._held: list[str] = []

    def add(self, text: str) -> str:
        told = text.rstrip()
        shown = self.take() + told if told else ""
        if len(told) < len(text):
            self._held.append(text[len(told) :])
        return shown

    def take(self) -> str:
        """What is held, and no longer is."""
        taken = "".join(self._held)
        self._held.clear()
        return taken


def first_of(text: str, tags: Iterable[str], start: int = 0) -> Found | None:
    """The tag that comes first from `start` on; of two at one place the longer one."""
    found = [Found(place, tag) for tag in tags if (place := text.find(tag, start)) >= 0]
    return min(found, key=lambda one: (one.start, -len(one.tag)), default=None)


def overlap(text: str, tags: Iterable[str]) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return max((_overlap(text, tag) for tag in tags), default=0)


def _overlap(text: str, tag: str) -> int:
    longest = min(len(tag) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(tag[:length])), 0)


def may_begin(text: str, tags: Iterable[str]) -> bool:
    """Whether a text is less than a whole tag."""
    return any(len(text) < len(tag) and tag.startswith(text) for tag in tags)
