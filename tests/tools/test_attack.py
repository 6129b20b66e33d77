"""What the attack tool sends, and what it calls wrong."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections import Counter

import pytest
from PIL import Image

from tools import hostile
from tools.attack import Outcome, _wrong


@pytest.mark.parametrize(
    "data",
    [hostile.jpeg_of_scans(64, 3), hostile.jpeg_of_segments(1000), hostile.png_of_chunks(1000), hostile.large_png(64),
     hostile.rle_bitmap(64)],
    ids=["scans", "segments", "chunks", "large", "runs"],
)  # fmt: skip
def test_hostile_pictures_are_pictures(data: bytes) -> None:
    Image.open(io.BytesIO(data)).load()


def test_bodies_are_seeded_and_mostly_readable() -> None:
    first, second = ([hostile.mutated_body(rng) for _ in range(300)] for rng in (random.Random(5), random.Random(5)))
    assert first == second
    assert len(set(first)) > 250
    parsed = 0
    for body in first:
        try:
            json.loads(body)
        except ValueError:
            continue
        parsed += 1
    assert 150 < parsed < 300


def test_what_inflates_is_small() -> None:
    data = hostile.inflating(4 << 20)
    assert len(data) < 10_000
    assert len(gzip.decompress(data)) == 4 << 20


def test_only_openais_error_object_is_right() -> None:
    good = json.dumps({"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": 400}}).encode()
    assert _wrong(200, b"anything") == _wrong(400, good) == _wrong(503, good) == ""
    assert "500" in _wrong(500, good)
    for answer in (b"400: Bad Request", b"[]", b'{"error": "no"}', good.replace(b'"param": null, ', b"")):
        assert "error object" in _wrong(400, answer)


def test_a_slow_or_restarted_server_is_not_fine() -> None:
    quiet = Outcome([0.1, 0.2, 0.3], [0.5, 0.6, 5.0], Counter())
    assert quiet.is_fine
    assert not Outcome([0.1], [0.31], Counter()).is_fine
    assert not Outcome([0.1], [0.1], Counter(), faults=["x"]).is_fine
    assert not Outcome([0.1], [0.1], Counter(), restarts=["vit.0"]).is_fine
