"""Guesses that the runner makes behind a step, with a head of the model. Pure: no torch, no model."""

from __future__ import annotations

from collections.abc import Sequence


class ToldProposer:
    """What it was told last, for as long as no token has come since."""

    def __init__(self) -> None:
        self._num_known = self._place = 0
        self._guesses: Sequence[int] = ()

    def tell(self, place: int, guesses: Sequence[int]) -> None:
        """Guesses of the tokens behind the first `place` ones."""
        self._place, self._guesses = place, guesses

    def extend(self, token_ids: Sequence[int]) -> None:
        self._num_known += len(token_ids)

    def propose(self, num_tokens: int) -> Sequence[int]:
        return self._guesses[:num_tokens] if self._place == self._num_known else ()
