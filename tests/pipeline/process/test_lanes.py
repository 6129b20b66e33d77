"""What a worker tells of its work while somebody looks at the lanes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.process import lanes as module
from pipeline.process.lanes import INTERVAL_S, Lanes
from pipeline.process.trace import Tracer
from pipeline.wire.lanes import MAX_SHOWN_REQUESTS, MAX_SHOWN_SPANS, WorkDone
from tests.fakes import LLM_0, VIT_0


class FakeEnd:
    def __init__(self) -> None:
        self.sent: list[WorkDone] = []
        self.is_full = False

    def try_send(self, message: WorkDone) -> bool:
        if not self.is_full:
            self.sent.append(message)
        return not self.is_full


class Rig:
    """Lanes whose clock stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.end, self.num_opened = 100.0, FakeEnd(), 0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.lanes = Lanes({"sender": LLM_0, "epoch": 3}, self._open)

    def _open(self) -> FakeEnd:
        self.num_opened += 1
        return self.end

    def step(self, start: float, end: float, ids: tuple[str, ...] = ("a", "b"), name: str = "decode") -> None:
        self.lanes.add(name, start, end, ids, len(ids), is_step=True)

    def told(self) -> list[tuple[Any, ...]]:
        """What is sent at the end of an interval."""
        self.now += INTERVAL_S
        self.lanes.flush()
        spans = [span for message in self.end.sent for span in message.spans]
        self.end.sent.clear()
        return [
            (one.name, round(one.start, 3), one.end and round(one.end, 3), one.amount, one.num_steps)
            for one in spans
        ]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    made = Rig(monkeypatch)
    made.lanes.watch(True)
    made.lanes.add("encode", 99.0, 99.5, (), 0, is_step=False)  # the first is sent at once
    made.end.sent.clear()
    return made


def test_while_nobody_looks_nothing_is_kept_and_no_socket_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    tracer = Tracer("", LLM_0, lanes=rig.lanes)

    def ids() -> Any:
        raise AssertionError("nobody asks which requests a step was for")
        yield ""

    assert not tracer.is_on, "rank 0 does not even gather the ids"
    tracer.step("decode", 1.0, ids(), 1, 2.0)
    tracer.span("encode", 1.0, ids(), 1)
    tracer.flush()
    assert rig.told() == []
    assert (rig.num_opened, rig.lanes.num_dropped) == (0, 0)


def test_a_tracer_tells_its_work_while_somebody_looks_and_not_after(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    tracer = Tracer("", VIT_0, lanes=rig.lanes)
    rig.lanes.watch(True)
    assert tracer.is_on
    tracer.span("encode", 1.0, ["a", "b", "a"], 64, end=1.5)
    (message,) = rig.end.sent
    assert (message.sender, message.epoch) == (LLM_0, 3)
    assert message.spans[0].request_ids == ("a", "b")
    rig.end.sent.clear()
    tracer.step("decode", 2.0, ["a"], 1, 2.1)
    rig.lanes.watch(False)
    assert rig.told() == [], "what was not sent when the last page left is forgotten"
    tracer.step("decode", 3.0, ["a"], 1, 3.1)
    assert rig.told() == []
    assert not tracer.is_on


def test_steps_that_are_alike_are_told_as_one(rig: Rig) -> None:
    for number in range(5):
        rig.step(100 + 0.02 * number, 100.02 + 0.02 * number)
    assert rig.told() == [("decode", 100.0, 100.1, 10, 5)]


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ((100.03, 100.05, ("a", "b"), "decode"), "there is a gap before it"),
        ((100.02, 100.04, ("a", "c"), "decode"), "it is for other requests"),
        ((100.02, 100.04, ("a", "b"), "decode and prefill"), "it is of another kind"),
        ((100.02, 100.07, ("a", "b"), "decode"), "it is long"),
    ],
)
def test_a_step_is_told_by_itself(rig: Rig, second: Any, why: str) -> None:
    rig.step(100.0, 100.02)
    rig.step(*second)
    assert len(rig.told()) == 2, why


def test_pieces_of_other_work_are_not_joined(rig: Rig) -> None:
    for _ in range(2):
        rig.lanes.add("encode", 100.0, 100.02, ("a",), 1, is_step=False)
    assert len(rig.told()) == 2


def test_a_message_is_sent_at_most_once_an_interval(rig: Rig) -> None:
    rig.step(100.0, 100.01)
    rig.now += INTERVAL_S / 2
    rig.step(100.1, 100.11)
    assert rig.end.sent == []
    rig.now += INTERVAL_S
    rig.step(100.3, 100.31)
    (message,) = rig.end.sent
    assert len(message.spans) == 3
    assert rig.num_opened == 1


def test_what_is_kept_is_bounded_and_the_rest_counted(rig: Rig) -> None:
    for number in range(MAX_SHOWN_SPANS + 7):
        rig.step(100 + number, 100.5 + number, tuple(f"r{index}" for index in range(100)))
    assert len(rig.told()) == MAX_SHOWN_SPANS
    assert rig.lanes.num_dropped == 7


def test_only_so_many_requests_of_a_step_are_named(rig: Rig) -> None:
    rig.step(100.0, 100.01, tuple(f"r{index}" for index in range(MAX_SHOWN_REQUESTS + 1)))
    rig.now += INTERVAL_S
    rig.lanes.flush()
    assert len(rig.end.sent[0].spans[0].request_ids) == MAX_SHOWN_REQUESTS


def test_what_the_reader_has_no_room_for_is_dropped(rig: Rig) -> None:
    rig.end.is_full = True
    rig.step(100.0, 100.01)
    assert rig.told() == []
    assert rig.lanes.num_dropped == 1
    rig.end.is_full = False
    rig.step(101.0, 101.01)
    assert len(rig.told()) == 1, "and nothing of it comes later"


def test_a_long_piece_of_work_is_told_when_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    tracer = Tracer("", VIT_0, lanes=rig.lanes)
    tracer.begin("encode", ["a"])
    assert rig.told() == [], "nobody looks"
    rig.lanes.watch(True)
    tracer.begin("encode", ["a"])
    (message,) = rig.end.sent
    assert (message.spans[0].name, message.spans[0].end) == ("encode", None)
    rig.end.sent.clear()
    tracer.span("encode", 1.0, ["a"], 64, end=1.5)
    rig.step(1.5, 1.6)
    assert [row[0] for row in rig.told()] == ["encode", "decode"]
