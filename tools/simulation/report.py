"""What a simulated or measured load was like, in numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tools.plots import Bar, Line, bars, color_of, height_of_bars, lines, page, shares
from tools.simulation.clock import Busy
from tools.simulation.pipeline import Outcome, Simulated

PANEL = (620, 340)
SHOWN_S = 4.0  # of the timeline
LANE = 16
NEARLY_ALWAYS = 0.9  # use of a stage


class Summary(NamedTuple):
    """Seconds, and numbers a second."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    requests_per_s: float
    tokens_per_s: float


ROWS = {  # the names and factors of what is shown
    "ttft_p50": ("TTFT P50, ms", 1000.0),
    "ttft_p99": ("TTFT P99, ms", 1000.0),
    "itl_p50": ("ITL P50, ms", 1000.0),
    "itl_p99": ("ITL P99, ms", 1000.0),
    "requests_per_s": ("requests/s", 1.0),
    "tokens_per_s": ("output tokens/s", 1.0),
}


def summary_of(ttfts: Sequence[float], gaps: Sequence[float], num_tokens: int, wall: float) -> Summary:
    """Raises ValueError without a request."""
    if not ttfts:
        raise ValueError("there is no request")
    ttft = np.percentile(ttfts, (50, 99))
    itl = np.percentile(gaps, (50, 99)) if gaps else np.zeros(2)
    return Summary(
        float(ttft[0]), float(ttft[1]), float(itl[0]), float(itl[1]), len(ttfts) / wall, num_tokens / wall
    )


def summarize(simulated: Simulated) -> Summary:
    outcomes = simulated.outcomes
    return summary_of(
        [one.ttft for one in outcomes],
        [gap for one in outcomes for gap in one.gaps],
        sum(len(one.arrivals) for one in outcomes),
        simulated.wall,
    )


def table(summary: Summary, simulated: Simulated) -> str:
    rows = [f"{name:18} {getattr(summary, key) * factor:10.1f}" for key, (name, factor) in ROWS.items()]
    rows += [
        f"{'use of ' + stage.name:18} {100 * stage.utilisation(simulated.wall):10.1f} %  of "
        f"{stage.num_servers}"
        for stage in simulated.stages
    ]
    rows += [
        f"{stage.name} is nearly always in use: see with more --num-requests whether its queue grows"
        for stage in simulated.stages
        if stage.utilisation(simulated.wall) > NEARLY_ALWAYS
    ]
    if simulated.num_preempted:
        rows.append(f"{'preemptions':18} {simulated.num_preempted:10d}")
    return "\n".join(rows)


def draw(named: Mapping[str, Sequence[Outcome]], stages: Sequence[Busy], wall: float) -> str:
    """An SVG: the distributions of TTFT and ITL of each named run, the use of the stages, and what each of
    their processes did in the first seconds."""
    width, height = PANEL
    ttft = [Line(name, shares([1000 * one.ttft for one in found])) for name, found in named.items()]
    itl = [
        Line(name, shares([1000 * gap for one in found for gap in one.gaps])) for name, found in named.items()
    ]
    drawn = lines("Time to first token: % of requests over ms", ttft, 0, 0, width, height)
    drawn += lines("Inter-token latency: % of gaps over ms", itl, width, 0, width, height)
    used = [
        Bar(f"{one.name} ({one.num_servers})", share, share, share, color_of(number))
        for number, one in enumerate(stages)
        for share in [100 * one.utilisation(wall)]
    ]
    top = height
    drawn += bars("Use of each stage, %", used, 10, top, 2 * width - 20, 220)
    top += height_of_bars(len(used))
    drawn += timeline(stages, 10, top, 2 * width - 20)
    return page(2 * width, top + 40 + LANE * sum(one.num_servers for one in stages), drawn)


def timeline(stages: Sequence[Busy], x: float, y: float, width: float) -> list[str]:
    """A lane for each process, and its pieces of work in the first seconds."""
    end = min(SHOWN_S, max((end for one in stages for _, _, end in one.spans), default=SHOWN_S)) or SHOWN_S
    label, top = 120, y + 20
    scale = (width - label) / end
    drawn = [
        f'<text x="{x}" y="{y + 12:.1f}" font-weight="bold">The first {end:.1f} s, a lane a process</text>'
    ]
    for number, one in enumerate(stages):
        for server in range(one.num_servers):
            drawn.append(f'<text x="{x}" y="{top + 12:.1f}">{one.name}.{server}</text>')
            drawn += [
                f'<rect x="{x + label + start * scale:.1f}" y="{top + 1:.1f}" '
                f'width="{max(0.3, (min(stop, end) - start) * scale - 0.3):.1f}" height="{LANE - 2}" '
                f'fill="{color_of(number)}"/>'
                for of, start, stop in one.spans
                if of == server and start < end
            ]
            top += LANE
    return drawn
