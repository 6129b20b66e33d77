"""What is kept of a turn, in memory and as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Figure(NamedTuple):
    value: float | None  # None: refused
    others: float  # share of the cores that others had while it was taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one server did in one round; `figures` by the name of the part."""

    peer: str
    round: int
    figures: dict[str, Figure]
    memory_rate: float  # bytes/s, just before
    error: str = ""
    answers: tuple[str, ...] = ()  # the first token about each of some pictures, the same for all servers

    @classmethod
    def of_json(cls, given: dict[str, Any]) -> Turn:
        figures = {name: Figure(*figure) for name, figure in given["figures"].items()}
        answers = tuple(given.get("answers", ()))
        return cls(**{**given, "figures": figures, "answers": answers})
