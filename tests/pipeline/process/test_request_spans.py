from __future__ import annotations

from pipeline.process.otlp import Attributes
from pipeline.process.request_spans import MAX_FOLLOWED, RequestSpans
from pipeline.wire.trace_context import TraceContext

TRACE = TraceContext("00-" + "1" * 32 + "-" + "2" * 16 + "-01")


class Sent:
    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float, dict[str, object]]] = []
        self.now = 0.0

    def __call__(
        self, name: str, trace: TraceContext, start: float, end: float, attributes: Attributes
    ) -> None:
        assert trace is TRACE
        self.spans.append((name, start, end, dict(attributes)))


def followed(sent: Sent, *request_ids: str) -> RequestSpans:
    spans = RequestSpans(sent, lambda: sent.now)
    for request_id in request_ids:
        spans.follow(request_id, 1, TRACE)
    return spans


def test_a_piece_of_work_is_a_span_of_each_request_that_is_followed() -> None:
    sent = Sent()
    followed(sent, "a", "b").add("encode", ["a", "b", "c"], 1.0, 2.0, 5)
    told = {"vlm.attempt": 1, "vlm.amount": 5}
    assert sent.spans == [("encode", 1.0, 2.0, {"vlm.request_id": name, **told}) for name in "ab"]


def test_stages_follow_one_another_and_a_preempted_request_enters_none_again() -> None:
    sent = Sent()
    spans = followed(sent, "a")
    for now, stage, behind in ((1.0, "queue", ""), (2.0, "prefill", "queue"), (3.0, "decode", "prefill")):
        sent.now = now
        spans.enter("a", stage, behind)
    spans.enter("a", "prefill", "queue")
    spans.enter("other", "queue")
    sent.now = 4.0
    spans.end("a", {"outcome": "stop"})
    spans.end("a", {})
    assert [one[:3] for one in sent.spans] == [
        ("queue", 1.0, 2.0),
        ("prefill", 2.0, 3.0),
        ("decode", 3.0, 4.0),
    ]
    assert sent.spans[-1][3] == {"vlm.request_id": "a", "vlm.attempt": 1, "outcome": "stop"}


def test_a_later_attempt_replaces_an_earlier_one_and_not_the_other_way_round() -> None:
    sent = Sent()
    spans = followed(sent, "a")
    spans.enter("a", "queue")
    spans.follow("a", 2, TRACE)
    spans.follow("a", 1, TRACE)
    spans.enter("a", "queue")
    spans.end("a", {})
    assert [one[3] for one in sent.spans] == [{"vlm.request_id": "a", "vlm.attempt": 2}]


def test_so_many_are_followed_and_the_oldest_is_forgotten() -> None:
    sent = Sent()
    spans = followed(sent, *map(str, range(MAX_FOLLOWED + 1)))
    spans.add("encode", ["0", "1"], 0.0, 1.0, 0)
    assert len(sent.spans) == 1
