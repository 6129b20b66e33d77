"""What a long training run needs: a schedule by steps, a state to go on from, a log, and a plot of it."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

WARMUP = 100  # steps


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up, then a half cosine down to 2 % of the peak."""
    return (
        peak
        * min(1.0, (step + 1) / WARMUP)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps))))
    )


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any time."""
    scratch = path.with_suffix(".part")
    torch.save(state, scratch)
    os.replace(scratch, path)


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True, map_location=device) if path.is_file() else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Its entries, without a last one that was not written to its end."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Log:
    """One JSON object a line, printed as well."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage, self._start = path, stage, time.monotonic()

    def go_on(self, step: int) -> None:
        """Drops what was written after `step`, which is learned again, and lets the clock of the stage go
        on."""
        kept = [
            entry for entry in read_log(self._path) if entry["stage"] != self._stage or entry["step"] <= step
        ]
        scratch = self._path.with_suffix(".part")
        scratch.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
        os.replace(scratch, self._path)
        self._start -= 60 * max(
            (entry["minutes"] for entry in kept if entry["stage"] == self._stage), default=0.0
        )

    def write(self, step: int, num_steps: int, **values: float) -> None:
        shown = {name: round(value, 4) for name, value in values.items()}
        minutes = round((time.monotonic() - self._start) / 60, 1)
        with self._path.open("a") as file:
            file.write(json.dumps({"stage": self._stage, "step": step, "minutes": minutes, **shown}) + "\n")
        text = "  ".join(f"{name} {value:.3g}" for name, value in shown.items())
        print(f"{self._stage} {step}/{num_steps}  {minutes} min  {text}", flush=True)


def plot(log: Path, picture: Path) -> None:
    """The losses of each stage over its steps, one panel a stage, as a PNG."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in read_log(log):
        points.setdefault(entry["stage"], []).append((entry["step"], entry["loss"]))
    width, height = 1000, 420
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    panel, margin = width // max(1, len(points)), 46
    for number, (stage, values) in enumerate(points.items()):
        left, right, top, bottom = number * panel + margin, (number + 1) * panel - 12, 30, height - 30
        most_steps, lowest, highest = (
            max(step for step, _ in values) or 1,
            min(v for _, v in values),
            max(v for _, v in values),
        )
        low, high = math.log(max(lowest, 1e-4)), math.log(highest) + 1e-6

        def at(step: int, loss: float) -> tuple[float, float]:
            share = (math.log(max(loss, 1e-4)) - low) / (high - low)  # noqa: B023
            return left + (right - left) * step / most_steps, bottom - (bottom - top) * share  # noqa: B023

        pen.line([(left, top), (left, bottom), (right, bottom)], fill="black")
        pen.line([at(*value) for value in values], fill=(36, 76, 212), width=2)
        pen.text((left + 8, 8), f"{stage}: loss (log scale) over {most_steps} steps", fill="black")
        for loss in (highest, lowest):
            pen.text((left - 42, at(0, loss)[1] - 6), f"{loss:.3g}", fill="black")
    image.save(picture)
