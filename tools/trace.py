"""A live run as a trace for Perfetto (ui.perfetto.dev) or chrome://tracing, and as a picture: one lane a
process.

    python -m tools.trace --out FOLDER                    # a server of its own, four streams and images
    beside them python -m tools.trace --out FOLDER --spans FOLDER     # what a server wrote that was started
    with --trace-dir

Each piece of work carries the ids of the requests it was done for. The picture has the LLM's steps and the
ViT's encodes above one another: where both have colour, they ran at the same time. Needs transformers (`pip
install -e '.[test]'`).
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image, ImageDraw, ImageFont

from launcher.checkpoints import EMBEDDED
from pipeline.process.trace import TraceSpan
from tools.bench_engine import raise_failed, serve
from tools.bench_serving import Workload, run_load

COLOURS = {
    "prepare": "#9aa0a6",
    "fetch": "#bdc1c6",
    "tokenise": "#e8710a",
    "decode picture": "#c58af9",
    "encode": "#f29900",
    "prefill": "#1a73e8",
    "decode and prefill": "#12a4af",
    "decode": "#34a853",
}
LANE, LABEL, TOP = 26, 120, 40  # pixels


def read_spans(folder: Path) -> dict[str, list[TraceSpan]]:
    """Of each worker, by start."""
    decoder = msgspec.json.Decoder(TraceSpan)
    found = {
        path.stem: sorted(decoder.decode_lines(path.read_bytes()), key=lambda span: span.start)
        for path in sorted(folder.glob("*.jsonl"))
    }
    return {worker: spans for worker, spans in found.items() if spans}


def lanes_of(spans: Sequence[TraceSpan]) -> list[int]:
    """For each of them, by start, the first lane in which nothing else goes on at that time."""
    free: list[int] = []
    ends: list[tuple[float, int]] = []
    lanes: list[int] = []
    for span in spans:
        while ends and ends[0][0] <= span.start:
            heapq.heappush(free, heapq.heappop(ends)[1])
        lane = heapq.heappop(free) if free else len(ends)
        heapq.heappush(ends, (span.end, lane))
        lanes.append(lane)
    return lanes


def to_chrome(found: dict[str, list[TraceSpan]]) -> dict[str, Any]:
    """The Trace Event Format: complete events, a process for each worker, times in microseconds from the
    first."""
    begin = min(spans[0].start for spans in found.values())
    events: list[dict[str, Any]] = []
    for number, (worker, spans) in enumerate(found.items()):
        events.append({"ph": "M", "pid": number, "name": "process_name", "args": {"name": worker}})
        for span, lane in zip(spans, lanes_of(spans), strict=True):
            events.append({
                "ph": "X", "pid": number, "tid": lane, "name": span.name, "ts": (span.start - begin) * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"requests": list(span.request_ids), "amount": span.amount},
            })  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(found: dict[str, list[TraceSpan]], width: int = 1600) -> Image.Image:
    begin = min(spans[0].start for spans in found.values())
    end = max(span.end for spans in found.values() for span in spans)
    rows = {worker: lanes_of(spans) for worker, spans in found.items()}
    image = Image.new(
        "RGB", (width, TOP + sum(max(lanes) + 1 for lanes in rows.values()) * LANE + 30), "white"
    )
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    scale = (width - LABEL - 10) / (end - begin)
    for index, (name, colour) in enumerate(COLOURS.items()):
        canvas.rectangle((LABEL + 170 * index, 12, LABEL + 170 * index + 12, 24), fill=colour)
        canvas.text((LABEL + 170 * index + 18, 10), name, fill="black", font=font)
    y = TOP
    for worker, spans in found.items():
        canvas.text((8, y + 5), worker, fill="black", font=font)
        for span, lane in zip(spans, rows[worker], strict=True):
            left, right = (LABEL + (at - begin) * scale for at in (span.start, span.end))
            top = y + lane * LANE
            canvas.rectangle(
                (left, top + 2, max(left, right - 1), top + LANE - 3), fill=COLOURS.get(span.name, "#5f6368")
            )
        y += (max(rows[worker]) + 1) * LANE
        canvas.line((0, y, width, y), fill="#dadce0")
    for tick in range(11):
        at = tick * (end - begin) / 10
        canvas.text((LABEL + at * scale - 12, y + 8), f"{at:.2f} s", fill="black", font=font)
    return image


def overlap(found: dict[str, list[TraceSpan]]) -> tuple[float, float]:
    """Seconds in which a ViT encoded, and seconds of those in which the LLM computed, too."""
    vit, llm = (
        [span for worker, spans in found.items() if worker.startswith(role) for span in spans]
        for role in ("vit", "llm")
    )
    both = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in vit for b in llm)
    return sum(span.end - span.start for span in vit), both


async def _load(url: str) -> None:
    rng = random.Random(0)
    streams, images = (
        Workload(num_words=16, num_output=160),
        Workload(num_words=8, num_output=8, num_images=1),
    )
    loads = [
        run_load(url, load, load.chats(4, rng), 2 if load is images else 4, 0.0, rng)
        for load in (streams, images)
    ]
    for results in await asyncio.gather(*loads):
        raise_failed(results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for trace.json and trace.png")
    parser.add_argument("--spans", type=Path, help="a server's --trace-dir")
    parser.add_argument("--model", type=Path, default=EMBEDDED / "model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.spans is None:
            with serve(args.model, "--trace-dir", scratch) as served:
                asyncio.run(_load(served.url))
        found = read_spans(args.spans or Path(scratch))
    if not found:
        raise SystemExit("there is no trace")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "trace.json").write_text(json.dumps(to_chrome(found)) + "\n")
    draw(found).save(args.out / "trace.png")
    encoding, both = overlap(found)
    print(
        f"{args.out / 'trace.json'}, {args.out / 'trace.png'}: ViTs encoded for {encoding:.2f} s, during "
        f"{both:.2f} s of them the LLM computed"
    )


if __name__ == "__main__":
    main()
