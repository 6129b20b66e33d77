"""Where a prompt is worth a snapshot of its state: at the ends of what other prompts will begin with. Pure.

These are the end of the system prompt with its tools, the last turns, the end before the generation prompt
(the next turn does not repeat that one's opening of a thought), each picture, some frames of a video, and the
last place of the prompt at all, for other choices and for another attempt. Each is the last multiple of the
window of states before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.wire.generation import MmItem

MAX_LAST_TURNS = 3
MAX_PICTURES = 8  # the last ones
MAX_FRAMES = 4  # of all videos of a prompt


class Boundary(NamedTuple):
    position: int  # tokens before it
    is_frame: bool


def boundaries_of(
    token_ids: Sequence[int], items: Sequence[MmItem], turn_start_id: int | None, multiple: int
) -> list[Boundary]:
    """Ascending, each position once, all before the last token of the prompt.

    turn_start_id: the token that begins a turn; None: the prompt has no turns.
    """
    turns = _turns(token_ids, turn_start_id)
    pictures = [item.spans[-1].stop for item in items if len(item.spans) == 1]
    frames = [span.stop for item in items if len(item.spans) > 1 for span in item.spans]
    ends = {len(token_ids) - 1, *turns[:1], *turns[-MAX_LAST_TURNS:], *pictures[-MAX_PICTURES:]}
    places = _floored(ends, multiple)
    of_frames = _floored(_spread(frames, MAX_FRAMES), multiple) - places
    return sorted(
        [*(Boundary(place, False) for place in places), *(Boundary(place, True) for place in of_frames)]
    )


def _turns(token_ids: Sequence[int], turn_start_id: int | None) -> list[int]:
    """The starts of all turns but the first: with a system prompt the first of these is its end."""
    return [place for place, token_id in enumerate(token_ids) if token_id == turn_start_id][1:]


def _spread(ends: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, at equal distances, with the last one."""
    step = -(-len(ends) // count) if ends else 1
    return list(ends[::-1][::step])


def _floored(ends: Iterable[int], multiple: int) -> set[int]:
    return {end // multiple * multiple for end in ends if end >= multiple}
