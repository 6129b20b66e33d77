"""Plots as SVG, for the benchmarks: lines over two axes, and bars. Pure: a figure is a text."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import NamedTuple

FONT = 'font-family="sans-serif"'
MARGIN = 50
PARTS = 4  # of an axis between its ends
BAR_HEIGHT, HEAD, GAP = 16, 22, 14


class Line(NamedTuple):
    name: str  # for the legend; empty: it has no place there
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    name: str
    value: float | None  # None: unknown
    least: float = 0.0  # of the values of which this is the middle
    most: float = 0.0
    color: str = "#4c78a8"


def page(width: float, height: float, parts: Sequence[str], font_size: int = 12) -> str:
    """A white page with these parts on it."""
    return "\n".join((
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" {FONT} '
        f'font-size="{font_size}">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        *parts,
        "</svg>\n",
    ))  # fmt: skip


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{html.escape(words)}</text>'


def color_of(number: int) -> str:
    """Neighbours differ, however many there are."""
    return f"hsl({number * 137 % 360},70%,45%)"


def lines(title: str, series: Sequence[Line], x: float, y: float, width: float, height: float) -> list[str]:
    """A panel at (x, y): lines over axes that begin at 0."""
    points = [point for line in series for point in line.points]
    right = max((at for at, _ in points), default=0.0) or 1.0
    top = max((value for _, value in points), default=0.0) or 1.0
    left, bottom = x + MARGIN, y + height - MARGIN
    across, up = width - 2 * MARGIN, height - 2 * MARGIN
    drawn = [text(left, y + 20, title, ' font-weight="bold"')]
    for part in range(PARTS + 1):
        at, level = left + across * part / PARTS, bottom - up * part / PARTS
        drawn.append(
            f'<line x1="{left:.1f}" x2="{left + across:.1f}" y1="{level:.1f}" y2="{level:.1f}" '
            'stroke="#ddd"/>'
        )
        drawn.append(text(left - 6, level + 4, shown(top * part / PARTS), ' text-anchor="end"'))
        drawn.append(text(at, bottom + 20, shown(right * part / PARTS), ' text-anchor="middle"'))
    for number, line in enumerate(series):
        path = " ".join(
            f"{left + at / right * across:.1f},{bottom - value / top * up:.1f}" for at, value in line.points
        )
        color = color_of(number)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        if line.name:
            at = bottom - 8 - 14 * (len(series) - 1 - number)  # distributions leave this corner free
            drawn.append(text(left + across, at, line.name, f' fill="{color}" text-anchor="end"'))
    return drawn


def bars(title: str, values: Sequence[Bar], x: float, y: float, width: float, label: float) -> list[str]:
    """A panel at (x, y): a bar for each value, with a thin line from its least to its most. `label`: the room
    for the names."""
    top = max((bar.most for bar in values if bar.value is not None), default=0.0) or 1.0
    scale = (width - label - 60) / top
    drawn = [text(x, y + 13, title, ' font-weight="bold"')]
    for number, bar in enumerate(values):
        at, start = y + HEAD + number * BAR_HEIGHT, x + label
        drawn.append(text(start - 6, at + 11, bar.name, ' text-anchor="end"'))
        if bar.value is None:
            continue
        drawn.append(
            f'<rect x="{start:.1f}" y="{at + 1:.1f}" width="{bar.value * scale:.1f}" '
            f'height="{BAR_HEIGHT - 3}" fill="{bar.color}"/>'
        )
        drawn.append(
            f'<line x1="{start + bar.least * scale:.1f}" x2="{start + bar.most * scale:.1f}" '
            f'y1="{at + BAR_HEIGHT / 2:.1f}" y2="{at + BAR_HEIGHT / 2:.1f}" stroke="black"/>'
        )
        drawn.append(text(start + bar.most * scale + 4, at + 11, shown(bar.value)))
    return drawn


def height_of_bars(count: int) -> int:
    return HEAD + count * BAR_HEIGHT + GAP


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the distribution: each value, and the percentage of all that are at most as large."""
    ordered = sorted(values)
    return [(value, 100 * (number + 1) / len(ordered)) for number, value in enumerate(ordered)]
