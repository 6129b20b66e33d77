"""What one page that shows the lanes is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.wire.control import WorkerState
from pipeline.wire.lanes import LaneSpan, WorkDone
from pipeline.wire.topology import Role, WorkerId
from tests.fakes import LLM_0, VIT_0
from workers.api import lane_viewer
from workers.api.lane_viewer import ALIVE, MAX_PENDING, SILENCE_S, LaneViewer

OWNERS = {"a": "key:alice", "b": "key:bob"}
STATES = (WorkerState(LLM_0, 1, True), WorkerState(VIT_0, 1, True))


def viewer_of(tenant: str = "key:alice", sees_all: bool = False, tp_size: int = 1) -> LaneViewer:
    return LaneViewer(tenant, sees_all, "off", OWNERS.get, tp_size, 100.0)


def done(*request_ids: str, name: str = "decode", start: float = 100.5, amount: int = 4) -> WorkDone:
    span = LaneSpan(name, start, start + 0.25, request_ids, amount, 2)
    return WorkDone(sender=LLM_0, epoch=1, spans=(span,))


def events(data: bytes) -> list[tuple[str, Any]]:
    found = []
    for part in data.decode().split("\n\n")[:-1]:
        name, body = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(body.removeprefix("data: "))))
    return found


def rows(viewer: LaneViewer) -> list[list[Any]]:
    """Of the LLM."""
    return [
        row
        for name, body in events(viewer.take(STATES, 101.0))
        if name == "work"
        for row in body["work"]["llm.0"]
    ]


def test_the_lanes_come_first_and_again_when_a_worker_is_replaced() -> None:
    viewer = viewer_of()
    [(name, body)] = events(viewer.take(STATES, 100.0))
    assert name == "lanes"
    assert body == {
        "at": 0.0,
        "lanes": [
            {"worker": "llm.0", "epoch": 1, "is_ready": True},
            {"worker": "vit.0", "epoch": 1, "is_ready": True},
        ],
        "sees": "own",
        "kill": "off",
    }
    assert viewer.take(STATES, 100.2) == b"", "nothing has changed"
    [(name, body)] = events(viewer.take((STATES[0], WorkerState(VIT_0, 2, False)), 100.4))
    assert (name, body["at"]) == ("lanes", 400.0)
    assert body["lanes"][1] == {"worker": "vit.0", "epoch": 2, "is_ready": False}


def test_what_a_worker_counts_is_no_change_of_its_lane() -> None:
    viewer = viewer_of()
    viewer.take(STATES, 100.0)
    assert viewer.take((WorkerState(LLM_0, 1, True, num_open_requests=5), STATES[1]), 100.2) == b""


def test_ranks_of_a_group_compute_the_steps_of_its_lead() -> None:
    ranks = tuple(WorkerState(WorkerId(Role.LLM, rank), 1, True) for rank in range(4))
    [(_, body)] = events(viewer_of(tp_size=2).take(ranks, 100.0))
    assert [lane.get("lead") for lane in body["lanes"]] == [None, "llm.0", None, "llm.2"]


def test_a_tenant_sees_its_own_requests_and_that_others_have_work_done() -> None:
    viewer = viewer_of()
    for work in (done("a"), done("b", name="encode"), done("b", "x", "a")):
        viewer.add(work)
    data = viewer.take(STATES, 101.0)
    work = dict(events(data))["work"]
    assert work["work"]["llm.0"] == [
        ["decode", 500.0, 250.0, [1], 4, 2],
        ["encode", 500.0, 250.0, [0], 0, 2],
        ["decode", 500.0, 250.0, [0, 1], 0, 2],
    ]
    assert work["requests"] == {"1": {"id": "a", "is_mine": True}}
    assert b'"b"' not in data
    assert b'"x"' not in data


def test_a_request_of_a_direct_client_is_nobodys() -> None:
    viewer = viewer_of("")
    viewer.add(done("x"))
    assert rows(viewer)[0][3] == [0]


def test_an_administrator_sees_all_and_which_are_his() -> None:
    viewer = viewer_of("key:bob", sees_all=True)
    viewer.add(done("a", "b", "x"))
    work = dict(events(viewer.take(STATES, 101.0)))["work"]
    assert work["work"]["llm.0"] == [["decode", 500.0, 250.0, [1, 2, 3], 4, 2]]
    assert work["requests"] == {
        "1": {"id": "a", "is_mine": False},
        "2": {"id": "b", "is_mine": True},
        "3": {"id": "x", "is_mine": False},
    }


def test_a_request_is_told_once_and_keeps_its_number() -> None:
    viewer = viewer_of()
    viewer.add(done("a"))
    viewer.take(STATES, 100.6)
    viewer.add(done("a"))
    [(_, body)] = events(viewer.take(STATES, 101.0))
    assert body["work"]["llm.0"][0][3] == [1]
    assert "requests" not in body


def test_numbers_are_bounded_and_never_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_viewer, "MAX_NUMBERED", 2)
    viewer = viewer_of(sees_all=True)
    viewer.add(done("a", "b"))
    viewer.add(done("a", "c"))
    viewer.add(done("b"))
    assert [row[3] for row in rows(viewer)] == [[1, 2], [1, 3], [4]]


def test_a_page_that_does_not_read_loses_the_oldest() -> None:
    viewer = viewer_of()
    for number in range(MAX_PENDING + 5):
        viewer.add(done("a", start=100.0 + number))
    work = dict(events(viewer.take(STATES, 101.0)))["work"]
    assert len(work["work"]["llm.0"]) == MAX_PENDING
    assert work["work"]["llm.0"][0][1] == 5000.0
    assert work["dropped"] == 5


def test_silence_is_broken_now_and_then() -> None:
    viewer = viewer_of()
    viewer.take(STATES, 100.0)
    assert viewer.take(STATES, 100.0 + SILENCE_S - 0.1) == b""
    assert viewer.take(STATES, 100.0 + SILENCE_S) == ALIVE
    assert viewer.take(STATES, 100.2 + SILENCE_S) == b""


def test_work_that_goes_on_has_no_duration() -> None:
    viewer = viewer_of()
    viewer.add(WorkDone(sender=LLM_0, epoch=1, spans=(LaneSpan("encode", 100.5, None, ("a",)),)))
    assert rows(viewer) == [["encode", 500.0, None, [1], 0, 1]]


def test_work_of_a_worker_that_has_died_does_not_go_on() -> None:
    viewer = viewer_of("key:alice")
    viewer.take(STATES, 100.0)
    begun = WorkDone(sender=VIT_0, epoch=1, spans=(LaneSpan("encode", 100.1, None, ("a",)),))
    viewer.add(begun)
    [(_, body)] = events(viewer.take(STATES, 100.2))
    assert body["work"]["vit.0"] == [["encode", 100.0, None, [1], 0, 1]]
    for successor in (
        WorkerState(VIT_0, 1, False),
        WorkerState(VIT_0, 2, False),
        WorkerState(VIT_0, 2, True),
    ):
        viewer.add(begun)  # told just before the death, which the launcher tells first
        assert [name for name, _ in events(viewer.take((STATES[0], successor), 100.4))] == ["lanes"]
    viewer.add(done("a"))
    [(_, body)] = events(viewer.take((STATES[0], successor), 100.6))
    assert [*body["work"]] == ["llm.0"]
