"""To which groups a client submits, as the launcher and the groups themselves tell."""

from __future__ import annotations

from pipeline.client.groups import BUSY_AFTER_S, Groups
from pipeline.wire.clients import PROTOCOL_VERSION, Welcome
from pipeline.wire.control import WorkerState
from pipeline.wire.topology import Role, WorkerId

LEADS = (0, 2)


def llm(rank: int) -> WorkerId:
    return WorkerId(Role.LLM, rank)


def welcome(rank: int, epoch: int = 1) -> Welcome:
    return Welcome(
        sender=llm(rank), epoch=epoch, protocol=PROTOCOL_VERSION, model_folder="", tokenizer_hash=b"",
        model_name="m", max_model_len=9, max_requests=9, max_request_bytes=9,
    )  # fmt: skip


def test_a_group_that_serves_is_greeted_and_then_known_until_it_dies() -> None:
    epochs = {llm(lead): 1 for lead in LEADS}
    groups = Groups(epochs)
    groups.leads = LEADS
    assert (groups.known, groups.ungreeted) == ({}, LEADS)
    groups.on_welcome(welcome(2))
    assert (groups.known, groups.ungreeted) == ({2: welcome(2)}, (0,))
    groups.on_states([WorkerState(llm(0), 1, True), WorkerState(llm(2), 2, False)])
    assert (groups.known, groups.ungreeted) == ({}, (0,)), "the dead one is neither"
    epochs[llm(2)] = 2
    groups.on_states([WorkerState(llm(0), 1, True), WorkerState(llm(2), 2, True)])
    assert groups.ungreeted == LEADS, "its successor has not welcomed the client"
    groups.on_welcome(welcome(2, epoch=2))
    assert groups.known.keys() == {2}
    groups.forget_welcomes()
    assert groups.known == {}


def test_a_group_that_may_have_the_request_is_in_a_long_step() -> None:
    groups = Groups({})
    groups.leads = LEADS
    groups.on_states([WorkerState(llm(0), 1, True), WorkerState(llm(2), 1, True, silent_s=BUSY_AFTER_S + 1)])
    assert [groups.is_in_long_step(lead) for lead in (0, 2, None)] == [False, True, True]
