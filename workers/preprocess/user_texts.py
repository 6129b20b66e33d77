"""Texts of users in which no special token can be spelt out, for the template to put together.

A special token that is spelt out in a user's text must stay text, also where it is spread over several texts,
or over what a template leaves of a text that it cuts. So a mark is put behind each character with which a
special token begins, and is taken out again when the specials of the rendered prompt have been found.

Templates look for some texts, `</think>` for example. Where one of these is written, it gets no mark.
"""

from __future__ import annotations

import re
from collections.abc import Collection


class UserTexts:
    """`specials`: the special tokens. `of_template`: the texts that the template writes or looks for.
    `names`: those by which it reads its values."""

    def __init__(
        self, specials: Collection[str], of_template: Collection[str], names: Collection[str]
    ) -> None:
        firsts = {token[0] for token in specials}
        begun = {token[:length] for token in specials for length in range(1, len(token))}
        ending = re.compile(f"(?:{_any_of(begun)})\\Z")
        whole = re.compile(_any_of(specials))
        looked_for = [
            text
            for text in of_template
            if text and text[0] in firsts and not whole.search(text) and not ending.search(text)
        ]
        self._beginning = re.compile(f"({_any_of(looked_for)})|({_any_of(firsts)})")
        # A template may write the beginning of a special token itself, right before a user's text. Then texts
        # that could be the token's rest have a mark in front, but for those that the template compares.
        self._is_begun_by_template = any(ending.search(text) for text in of_template)
        self._rests = {token[length:] for token in specials for length in range(1, len(token))}
        self._compared = {*of_template, *names}

    def marked(self, text: str, mark: str) -> str:
        marked = self._beginning.sub(lambda match: match.group(1) or match.group(2) + mark, text)
        if self._is_begun_by_template and text not in self._compared and self._may_be_a_rest(text):
            return mark + marked
        return marked

    def _may_be_a_rest(self, text: str) -> bool:
        return text != "" and any(text.startswith(rest) or rest.startswith(text) for rest in self._rests)


def _any_of(texts: Collection[str]) -> str:
    """The longest first."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
