from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkpoints import make_checkpoint


def test_figures_of_a_tiny_checkpoint(tmp_path: Path) -> None:
    """In a process of its own, since forks of one that has computed may hang."""
    folder = make_checkpoint(tmp_path / "tiny")
    command = [sys.executable, "-m", "tools.bench_load", str(folder), "--dtype", "float32"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    first, *_, decoder, tower, both = found.stdout.splitlines()
    assert first.startswith("tiny, 0.01 GB, float32, ")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (decoder, tower, both)]
    assert [row[0] for row in rows] == ["decoder", "tower", "both"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:3])
    peaks = [float(row[3]) for row in rows]
    assert peaks[2] > max(peaks[:2]) > 0, "of both at once the sum"
