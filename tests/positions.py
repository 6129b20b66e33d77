"""The rows of M-RoPE as transformers computed them up to release 5.2, written a second time for tests.

From 5.3 to 5.24 the text behind a video of Qwen2-VL and Qwen2.5-VL goes on after the larger side of a frame,
even where the video's time has got further. The models were trained with the rule here: text goes on after
the largest position so far.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

TEXT, PICTURE, VIDEO = 0, 1, 2  # as in `mm_token_type_ids`
Place = tuple[int, int, int]  # time, row, column


def rope_index(
    token_types: Sequence[int],
    picture_grids: Sequence[Sequence[int]],
    video_grids: Sequence[Sequence[int]],
    merge_size: int,
    time_steps: Sequence[float],
) -> tuple[Tensor, int]:
    """Rows [3, tokens] int64, and what a later token adds to its index.

    Grids are (time, rows, columns) of patches; `time_steps` are the positions from one temporal patch of each
    video to the next.
    """
    pictures, videos = iter(picture_grids), iter(zip(video_grids, time_steps, strict=True))
    places: list[Place] = []
    for kind, group in itertools.groupby(token_types):
        num_tokens, start = len(list(group)), _next(places)
        if kind == TEXT:
            places += [(position,) * 3 for position in range(start, start + num_tokens)]
            continue
        grid, step = (next(pictures), 1.0) if kind == PICTURE else next(videos)
        run = _run(start, grid, merge_size, step)
        assert len(run) == num_tokens, f"{num_tokens} tokens stand for {len(run)}"
        places += run
    return torch.tensor(places).T, _next(places) - len(places)


def _next(places: Sequence[Place]) -> int:
    return 1 + max(map(max, places), default=-1)


def _run(start: int, grid: Sequence[int], merge_size: int, step: float) -> list[Place]:
    """The product in float32, rounded down; then the start is added."""
    time, rows, columns = grid[0], grid[1] // merge_size, grid[2] // merge_size
    times = (torch.arange(time, dtype=torch.float32) * torch.tensor(step, dtype=torch.float32)).long()
    return [
        (start + time, start + row, start + column)
        for time in times.tolist()
        for row in range(rows)
        for column in range(columns)
    ]
