from __future__ import annotations

import numpy as np

from pipeline.families.mrope import Run, mrope_positions
from pipeline.wire.base import GridTHW
from pipeline.wire.generation import Span


def test_text_alone_counts_on_in_all_rows() -> None:
    rows, delta = mrope_positions(5, [])
    assert rows.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert rows.dtype == np.int32
    assert delta == 0


def test_each_run_starts_where_the_text_before_it_ended() -> None:
    """Frames as runs of their own, with text between, as Qwen3's videos are."""
    runs = [Run(Span(2, 6), GridTHW(1, 2, 3)), Run(Span(10, 6), GridTHW(1, 2, 3))]
    rows, delta = mrope_positions(17, runs)
    assert rows[0].tolist() == [0, 1] + [2] * 6 + [5, 6] + [7] * 6 + [10]
    assert rows[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 7, 7, 8, 8, 8, 10]
    assert rows[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 9, 10]
    assert delta == 11 - 17


def test_time_may_step_in_fractions_and_is_rounded_down() -> None:
    """Seconds between frames, as in Qwen2.5-VL."""
    rows, _ = mrope_positions(8, [Run(Span(1, 6), GridTHW(6, 1, 1), time_step=0.5)])
    assert rows[0].tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    rows, delta = mrope_positions(5, [Run(Span(1, 3), GridTHW(3, 1, 1), time_step=2.0)])
    assert rows[0].tolist() == [0, 1, 3, 5, 6]
    assert delta == 7 - 5
