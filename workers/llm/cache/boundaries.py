"""Where a prompt is worth a snapshot of its state: at the ends of what other prompts will begin with. Pure.

By importance: the last place of the prompt at all, for other choices and for another attempt; the end of the
system prompt with its tools; the last turns, among them the end before the generation prompt (the next turn
does not repeat that one's opening of a thought); pictures; some frames of videos. Each is the last multiple
of the window of states before it. Each takes a place of the snapshots, so short prompts have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline.wire.generation import MmItem

MIN_WINDOWS = 2  # before the first one: fewer are computed in little time
MAX_LAST_TURNS = 3
MAX_PICTURES = 8  # the last ones
MAX_FRAMES = 4  # of all videos of a prompt


class Boundary(NamedTuple):
    position: int  # tokens before it
    is_frame: bool


def boundaries_of(
    token_ids: Sequence[int],
    items: Sequence[MmItem],
    turn_start_id: int | None,
    multiple: int,
    max_count: int,
) -> list[Boundary]:
    """The most important ones; ascending, each position once, all before the last token of the prompt.

    turn_start_id: the token that begins a turn; None: the prompt has no turns.
    """
    last = len(token_ids) - 1
    chosen: dict[int, Boundary] = {}
    for end, is_frame in _by_importance(token_ids, items, turn_start_id):
        place = last_place(min(end, last) + 1, multiple)
        if place and len(chosen) < max_count:
            chosen.setdefault(place, Boundary(place, is_frame))
    return sorted(chosen.values())


def last_place(num_tokens: int, multiple: int) -> int:
    """The last one before the last of so many tokens; 0: there is none."""
    place = (num_tokens - 1) // multiple * multiple
    return place if place >= MIN_WINDOWS * multiple else 0


def _by_importance(
    token_ids: Sequence[int], items: Sequence[MmItem], turn_start_id: int | None
) -> Iterator[tuple[int, bool]]:
    """Ends, and whether they are a frame's."""
    # The starts of all turns but the first: with a system prompt the first of these is its end.
    turns = [place for place, token_id in enumerate(token_ids) if token_id == turn_start_id][1:]
    pictures = [item.spans[-1].stop for item in items if len(item.spans) == 1]
    frames = [span.stop for item in items if len(item.spans) > 1 for span in item.spans]
    between = -(-len(frames) // MAX_FRAMES) or 1
    for end in (len(token_ids) - 1, *turns[:1], *turns[: -MAX_LAST_TURNS - 1 : -1]):
        yield end, False
    for end in pictures[: -MAX_PICTURES - 1 : -1]:
        yield end, False
    for end in frames[::-between]:
        yield end, True
