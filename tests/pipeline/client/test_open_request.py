"""What a client has of its request: choices, gaps, and what the next attempt is told."""

from __future__ import annotations

import pytest

from pipeline.client.open_request import OpenRequest
from pipeline.wire.clients import ChoiceProgress, MediaTokens, RequestOutput, SubmitRequest
from pipeline.wire.packing import pack_int32
from pipeline.wire.prompts import Chat
from pipeline.wire.sampling import FinishReason, SamplingParams


@pytest.fixture
async def opened() -> OpenRequest:
    request = SubmitRequest(
        client_id=b"c" * 16, request_id="r", attempt=1, prompt=Chat(()), sampling=SamplingParams(n=2)
    )
    return OpenRequest(request, [], heard=0.0)


def output(
    index: int, offset: int, *token_ids: int, end: FinishReason | None = None, cached: int = 0
) -> RequestOutput:
    media = MediaTokens(prefix_cached=cached)
    return RequestOutput("r", 1, offset, pack_int32(token_ids), end, (), cached, index, media=media)


async def test_what_is_repeated_is_passed_on_once_and_a_gap_is_none(opened: OpenRequest) -> None:
    assert opened.take(output(1, 0, 5, 6))
    assert not opened.take(output(1, 3, 8)), "7 is missing"
    assert opened.take(output(1, 1, 6, 7))
    events = [opened.events.get_nowait() for _ in range(2)]
    assert events == [output(1, 0, 5, 6), output(1, 2, 7)]
    assert opened.query().num_received == (0, 3)


async def test_the_next_attempt_continues_each_choice(opened: OpenRequest) -> None:
    opened.take(output(0, 0, 5, cached=16))
    opened.take(output(1, 0, 6, end=FinishReason.STOP))
    assert opened.has_progress
    opened.begin_attempt(3.0)
    assert opened.request.attempt == 2
    assert opened.progress() == (
        ChoiceProgress(pack_int32([5])),
        ChoiceProgress(pack_int32([6]), is_over=True),
    )
    assert (opened.has_progress, opened.has_tokens, opened.waits_since) == (False, True, 3.0)
    opened.take(output(0, 1, 7, end=FinishReason.STOP, cached=32))
    last = [opened.events.get_nowait() for _ in range(3)][-1]
    assert isinstance(last, RequestOutput)
    assert (last.num_cached_tokens, last.media) == (16, MediaTokens(prefix_cached=16)), (
        "as the first attempt found them"
    )
    assert opened.is_over


async def test_a_choice_that_is_over_takes_nothing(opened: OpenRequest) -> None:
    opened.take(output(0, 0, 5, end=FinishReason.STOP))
    opened.is_asking = True
    assert opened.take(output(0, 4, 9))
    assert opened.events.qsize() == 1
    assert not opened.is_asking


async def test_the_choice_that_is_silent_longest_counts(opened: OpenRequest) -> None:
    opened.hear(1.0)
    opened.heard = 2.0
    opened.take(output(0, 0, 5))
    assert opened.silent_since == 1.0, "nothing of choice 1"
    opened.take(output(1, 0, 6, end=FinishReason.STOP))
    assert opened.silent_since == 2.0
    opened.hear(3.0)
    assert opened.silent_since == 3.0


async def test_a_choice_that_was_aborted_while_the_request_is_held_is_over_in_the_next_attempt(
    opened: OpenRequest,
) -> None:
    opened.take(output(0, 0, 5))
    opened.begin_attempt(3.0)
    opened.choices[0].is_over = True
    assert [choice.is_over for choice in opened.progress()] == [True, False]


async def test_the_first_submission_says_nothing_of_choices(opened: OpenRequest) -> None:
    assert opened.progress() == ()
