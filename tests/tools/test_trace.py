from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipeline.process.trace import Tracer, TraceSpan
from pipeline.wire.topology import Role, WorkerId
from tools import trace


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tracer = Tracer("", WorkerId(Role.VIT))
    tracer.span("encode", 0.0, ["r"])
    tracer.flush()
    assert not tracer.is_on
    assert list(tmp_path.iterdir()) == []


def test_work_at_the_same_time_lies_in_lanes_of_its_own() -> None:
    def span(start: float, end: float) -> TraceSpan:
        return TraceSpan("x", start, end, ())

    spans = [span(0, 4), span(1, 2), span(1.5, 3), span(2, 5), span(4, 6), span(7, 8)]
    assert trace.lanes_of(spans) == [0, 1, 2, 1, 0, 0]


def test_a_live_run_shows_llm_and_vit_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trace", "--out", str(tmp_path / "out")])
    trace.main()
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["ph"] == "M"}
    assert set(names) == {"llm.0", "preprocess.0", "vit.0"}
    work = {
        worker: [event for event in events if event["ph"] == "X" and event["pid"] == pid]
        for worker, pid in names.items()
    }
    assert {event["name"] for event in work["llm.0"]} >= {"decode", "prefill"}
    assert {event["name"] for event in work["preprocess.0"]} == {
        "prepare",
        "fetch",
        "tokenise",
        "decode picture",
    }
    encoded = {request for event in work["vit.0"] for request in event["args"]["requests"]}
    assert len(encoded) == 4, "four chats had pictures"
    assert encoded <= {request for event in work["llm.0"] for request in event["args"]["requests"]}
    for events_of in work.values():
        by_lane: dict[int, float] = {}
        for event in events_of:
            assert event["dur"] >= 0
            assert event["ts"] >= by_lane.get(event["tid"], 0.0) - 1, "one thing at a time in a lane"
            by_lane[event["tid"]] = event["ts"] + event["dur"]
    seconds = [float(word) for word in capsys.readouterr().out.split() if word.replace(".", "", 1).isdigit()]
    assert seconds[0] > 0
    assert 0 < seconds[1] <= seconds[0] * 1.01
    assert (tmp_path / "out" / "trace.png").stat().st_size > 2000
