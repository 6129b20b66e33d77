"""What the attack tool sends, and what it calls wrong."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from tools import attack, hostile
from tools.attack import SIZES, Outcome


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


async def test_an_attacker_that_dies_is_reported_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an unknown kind it dies in its first step; as `nested` does without a run directory."""
    monkeypatch.setattr(attack, "PAUSE_S", 0.01)
    monkeypatch.setattr(attack, "START_S", 0.1)

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=json.dumps({"choices": []}), content_type="application/json")

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(text='vlm_worker_restarts_total{worker="llm.0"} 0')

    application = web.Application()
    application.router.add_post("/v1/chat/completions", answer)
    application.router.add_get("/metrics", metrics)
    async with TestServer(application) as server:
        for kind in ("no such kind", "nested"):
            async with asyncio.timeout(60):
                found = await attack.attack(
                    kind, str(server.make_url("/v1")), tmp_path / "gone", SIZES["small"], 1
                )
            assert found.faults == ["the attacker's process has died"]
            assert len(found.beside) >= 3
            assert not found.is_fine
