"""What the attack tool sends, and what it calls wrong."""

from __future__ import annotations

import gzip
import io
from collections import Counter

import pytest
from PIL import Image

from tools import hostile
from tools.attack import Outcome


@pytest.mark.parametrize(
    "data",
    [
        hostile.jpeg_of_scans(64, 3),
        hostile.jpeg_of_segments(1000),
        hostile.png_of_chunks(1000),
        hostile.large_png(64),
        hostile.rle_bitmap(64),
    ],
    ids=["scans", "segments", "chunks", "large", "runs"],
)
def test_hostile_pictures_are_pictures(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def test_what_inflates_is_small() -> None:
    data = hostile.inflating(4 << 20)
    assert len(data) < 10_000
    assert len(gzip.decompress(data)) == 4 << 20


def test_a_slow_or_restarted_server_is_not_fine() -> None:
    quiet = Outcome([0.1, 0.2, 0.3], [0.5, 0.6, 5.0], Counter())
    assert quiet.is_fine
    assert not Outcome([0.1], [0.31], Counter()).is_fine
    assert not Outcome([0.1], [0.1], Counter(), faults=["x"]).is_fine
    assert not Outcome([0.1], [0.1], Counter(), restarts=["vit.0"]).is_fine
