"""Guesses for tests: right and wrong ones."""

from __future__ import annotations

from collections.abc import Sequence

from workers.llm.speculation.drafter import Drafter


class Guesses:
    """A proposer that knows whole texts, prompts included, and puts in a wrong token now and then."""

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self._texts = texts
        self.taken: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        self.taken += token_ids

    def propose(self, num_tokens: int) -> list[int]:
        place = len(self.taken)
        known = [text for text in self._texts if list(text[:place]) == self.taken]
        if not known:
            return []
        text = known[place % len(known)]
        drafts = [*text[place : place + num_tokens]]
        if (wrong := place % 6) < len(drafts):
            drafts[wrong] = (drafts[wrong] + 1) % 90
        return drafts


def drafter_of(texts: Sequence[Sequence[int]], num_tokens: int = 5, max_rows: int = 16) -> Drafter:
    return Drafter(lambda: Guesses(texts), num_tokens, max_rows)
