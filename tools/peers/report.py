"""The table and the plot of many turns. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tools.peers.figures import Turn
from tools.plots import Bar, bars, height_of_bars, page, shown, text

GIB = 2**30


class Row(NamedTuple):
    part: str
    label: str
    is_rate: bool  # more is better
    unit: float = 1.0  # of the figures, in those that are shown


ROWS = (
    Row("prefill", "prefill 512, tokens/s", True),
    Row("decode1", "decode, 1 stream, tokens/s", True),
    Row("decode8", "decode, 8 streams, tokens/s", True),
    Row("picture", "448² picture: TTFT beyond that of as much text, s", False),
    Row("together", "8 × (448² picture + answer), s", False),
    Row("start", "start to first answer, s", False),
    Row("memory", "memory (PSS), GiB", False, GIB),
    Row("peak", "most of it, GiB", False, GIB),
)


class Column(NamedTuple):
    key: str  # of the peer
    name: str
    is_quantized: bool


def values_of(turns: Sequence[Turn], key: str, row: Row) -> list[float]:
    """Of all rounds that were not refused, in the unit that is shown."""
    figures = [turn.figures.get(row.part) for turn in turns if turn.peer == key]
    return [figure.value / row.unit for figure in figures if figure is not None and figure.value is not None]


def median_of(turns: Sequence[Turn], key: str, row: Row) -> float | None:
    values = values_of(turns, key, row)
    return statistics.median(values) if values else None


def advantage(row: Row, ours: float | None, others: Sequence[float | None]) -> float | None:
    """Ours beside the best of the others: above 1 where ours is better."""
    known = [value for value in others if value is not None]
    if ours is None or not known:
        return None
    best = max(known) if row.is_rate else min(known)
    return ours / best if row.is_rate else best / ours


def table(turns: Sequence[Turn], columns: Sequence[Column], has_ratio: bool) -> str:
    """Medians; the best of a row in bold. `has_ratio`: the first column is ours, and is compared with the
    best of the others."""
    heads = ["", *(column.name for column in columns), *(["ours beside the best"] if has_ratio else [])]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in ROWS:
        medians = [median_of(turns, column.key, row) for column in columns]
        known = [value for value in medians if value is not None]
        if not known:
            continue
        best = max(known) if row.is_rate else min(known)
        cells = [
            "–" if value is None else f"**{shown(value)}**" if value == best else shown(value)
            for value in medians
        ]
        if has_ratio:
            ratio = advantage(row, medians[0], medians[1:])
            cells.append("" if ratio is None else f"{ratio:.2f}")
        lines.append(f"| {' | '.join([row.label, *cells])} |")
    return "\n".join(lines)


def count_refused(turns: Sequence[Turn]) -> int:
    return sum(figure.value is None for turn in turns for figure in turn.figures.values())


# The plot: a panel for each row, a bar for each server, a thin line from its least to its most.

WIDTH, LABEL = 460, 130
COLORS = {False: "#4c78a8", True: "#9ecae9"}  # 16 bits, quantised
OURS = {False: "#e45756", True: "#f2a6a5"}


def bar_of(turns: Sequence[Turn], column: Column, row: Row) -> Bar:
    values = values_of(turns, column.key, row)
    color = (OURS if column.key.startswith("ours") else COLORS)[column.is_quantized]
    if not values:
        return Bar(column.name, None)
    return Bar(column.name, statistics.median(values), min(values), max(values), color)


def plot(turns: Sequence[Turn], columns: Sequence[Column], title: str) -> str:
    """An SVG."""
    rows = [row for row in ROWS if any(values_of(turns, column.key, row) for column in columns)]
    height = height_of_bars(len(columns))
    drawn = [text(10, 18, title, ' font-size="13"')]
    for number, row in enumerate(rows):
        name = f"{row.label} ({'more' if row.is_rate else 'less'} is better)"
        values = [bar_of(turns, column, row) for column in columns]
        drawn += bars(name, values, 10 + number % 2 * WIDTH, 30 + number // 2 * height, WIDTH, LABEL)
    return page(2 * WIDTH + 20, 30 + -(-len(rows) // 2) * height, drawn, font_size=11)


def agreement(turns: Sequence[Turn]) -> dict[str, tuple[int, int]]:
    """By the peer: how many first tokens about a picture are ours of the same round, and of how many."""
    ours = {turn.round: turn.answers for turn in turns if turn.peer == "ours"}
    found: dict[str, tuple[int, int]] = {}
    for turn in turns:
        if turn.peer != "ours" and (pairs := list(zip(turn.answers, ours.get(turn.round, ()), strict=False))):
            same, total = found.get(turn.peer, (0, 0))
            found[turn.peer] = (same + sum(left == right for left, right in pairs), total + len(pairs))
    return found


def notes(turns: Sequence[Turn], versions: Mapping[str, str], num_weight_bytes: int) -> list[str]:
    """What stands under the table."""
    rates = [turn.memory_rate / 1e9 for turn in turns]
    counts = Counter(turn.peer for turn in turns if not turn.error)
    most, middle = max(counts.values(), default=0), statistics.median(rates)
    fewer = ", ".join(f"{peer} {count}" for peer, count in counts.items() if count < most)
    lines = [
        f"Medians of {most} interleaved rounds{f' ({fewer})' if fewer else ''}; "
        f"{count_refused(turns)} figures refused since others used the cores.",
        f"Memory's rate before each turn (tools/memory_rate.py): {middle:.1f} GB/s ({min(rates):.1f} to "
        f"{max(rates):.1f}).",
    ]
    decode = next(row for row in ROWS if row.part == "decode1")
    if ours := median_of(turns, "ours", decode):
        share = ours * num_weight_bytes / 1e9 / middle
        lines.append(
            f"A token of one stream reads {num_weight_bytes / 1e6:.0f} MB of weights in 16 bits: ours reads "
            f"at {share:.2f} of the memory's rate."
        )
    if same := agreement(turns):
        told = "; ".join(f"{peer} {count} of {total}" for peer, (count, total) in same.items())
        lines.append(f"First tokens about pictures of noise that are ours: {told}.")
    lines.append("Versions: " + "; ".join(f"{name}: {version}" for name, version in versions.items()) + ".")
    lines += [f"{turn.peer} failed in round {turn.round}." for turn in turns if turn.error]
    return lines
