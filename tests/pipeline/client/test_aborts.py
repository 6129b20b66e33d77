"""Aborts are repeated until the choices that they are to end have ended."""

from __future__ import annotations

from pipeline.client.aborts import MAX_ABORTS, Aborts
from pipeline.wire.clients import AbortRequest, RequestOutput
from pipeline.wire.sampling import FinishReason


def abort(index: int | None = None) -> AbortRequest:
    return AbortRequest(client_id=b"c" * 16, request_id="r", attempt=1, index=index)


def end(index: int, reason: FinishReason = FinishReason.LENGTH) -> RequestOutput:
    return RequestOutput("r", 1, 0, b"", reason, index=index)


def test_the_abort_of_a_request_is_repeated_until_its_last_choice_ends() -> None:
    aborts = Aborts()
    aborts.add(abort(), {0, 2})
    assert aborts.due() == [abort()]
    aborts.on_end_of_choice(end(0))
    assert aborts.due() == [abort()]
    assert "r" in aborts
    aborts.on_end_of_choice(end(2))
    assert not aborts


def test_one_choice_that_was_aborted_says_that_the_abort_has_arrived() -> None:
    aborts = Aborts()
    aborts.add(abort(), {0, 2})
    aborts.on_end_of_choice(end(0, FinishReason.ABORT))
    assert not aborts


def test_the_abort_of_a_choice_is_its_own() -> None:
    aborts = Aborts()
    aborts.add(abort(0), {0})
    aborts.add(abort(1), {1})
    aborts.on_end_of_choice(end(0, FinishReason.ABORT))
    assert aborts.due() == [abort(1)]
    aborts.forget("r")
    assert not aborts
    assert "r" not in aborts


def test_the_answer_to_the_abort_of_a_choice_confirms_no_other_abort() -> None:
    aborts = Aborts()
    aborts.add(abort(1), {1})
    aborts.add(abort(), {0, 2})
    aborts.on_end_of_choice(end(1, FinishReason.ABORT))
    assert aborts.due() == [abort()]


def test_an_abort_that_nobody_answers_is_not_repeated_for_ever() -> None:
    aborts = Aborts()
    aborts.add(abort(), {0})
    assert sum(len(aborts.due()) for _ in range(2 * MAX_ABORTS)) == MAX_ABORTS - 1
    assert not aborts
