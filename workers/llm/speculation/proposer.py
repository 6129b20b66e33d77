"""The contract of a proposer: it guesses how the text of one request goes on.

    extend(token_ids) → propose(num_tokens) → a step computes them → extend(token_ids) → …

A guess is only ever a guess: a step keeps as many of its tokens as the model itself chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Proposer(Protocol):
    def extend(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens of the request: those of the prompt first."""
        ...

    def propose(self, num_tokens: int) -> Sequence[int]:
        """At most `num_tokens` tokens that may come next; none without a guess."""
        ...
