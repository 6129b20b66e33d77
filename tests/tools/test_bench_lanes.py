"""The measurement of the lanes' cost, at an endpoint without a pipeline."""

from __future__ import annotations

import time

import pytest

from pipeline.wire.control import WorkerState
from tests.fakes import LLM_0
from tests.workers.api.serving import FakeClient, endpoint, serving
from tools import bench_lanes
from tools.bench_lanes import NUM_STREAMS, compare
from workers.api import lane_viewer
from workers.api.launcher_requests import LauncherRequests


async def test_streams_are_measured_with_and_without_a_page_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_lanes, "SETTLING_S", 0.5)
    monkeypatch.setattr(lane_viewer, "SILENCE_S", 0.1)  # a page that has left is found by writing to it
    watched: list[float] = []
    client = FakeClient()
    client.workers = (WorkerState(LLM_0, 1, True),)
    async with serving(endpoint(client, launcher=LauncherRequests(watch=watched.append))) as site:
        without, beside = await compare(f"http://{site.host}:{site.port}", 2, 1, time.process_time)
    assert (len(without), len(beside)) == (2, 2)
    assert client.num_asked == 5 * NUM_STREAMS, "one round warms up"
    assert [seconds for seconds in watched if not seconds] == [0.0, 0.0], "twice a page has looked, and left"
    assert all(one.tokens_per_s > 0 for one in (*without, *beside))
    assert all(one.cpu_ms > 0 for one in (*without, *beside))
