"""A bell wakes who waits, in another process too."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from pipeline.process.bell import Bell

LONG_S = 20.0


def test_who_waits_is_woken_and_a_ring_before_is_not_lost(tmp_path: Path) -> None:
    mine, theirs = Bell(tmp_path / "bell"), Bell(tmp_path / "bell")
    start = time.monotonic()
    mine.wait(0.02)
    assert time.monotonic() - start >= 0.02, "nobody rang"
    theirs.ring()
    theirs.ring()
    mine.wait(LONG_S)
    ringer = threading.Timer(0.02, theirs.ring)
    ringer.start()
    mine.wait(LONG_S)
    ringer.join()
    assert 0.04 <= time.monotonic() - start < LONG_S
    for bell in (mine, theirs):
        bell.close()


def test_a_bell_that_nobody_hears_blocks_nobody(tmp_path: Path) -> None:
    bell = Bell(tmp_path / "bell")
    for _ in range(70_000):  # more than a pipe holds
        bell.ring()
    bell.wait(LONG_S)
    bell.close()
    assert os.listdir(tmp_path) == ["bell"]
