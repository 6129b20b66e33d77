"""A burst of requests is spread over turns of the event loop."""

from __future__ import annotations

import asyncio

from workers.api.admission import Admission

NUM_REQUESTS = 20


async def test_a_burst_is_taken_in_order_and_one_at_a_time() -> None:
    admission, taken, now = Admission(), list[tuple[int, int]](), 0

    async def work(number: int) -> None:
        await admission.wait()
        taken.append((number, now))

    async def count() -> None:
        nonlocal now
        while True:
            now += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    await asyncio.gather(*(work(number) for number in range(NUM_REQUESTS)))
    counting.cancel()
    assert [number for number, _ in taken] == list(range(NUM_REQUESTS))
    in_turn = [sum(when == turn for _, when in taken) for turn in {when for _, when in taken}]
    assert max(in_turn) <= 1


async def test_who_is_alone_does_not_wait_and_who_leaves_takes_no_turn() -> None:
    admission = Admission()
    alone = admission.wait()
    try:
        alone.send(None)
    except StopIteration:
        pass
    else:
        raise AssertionError("it waited")
    crowd = [asyncio.create_task(admission.wait()) for _ in range(NUM_REQUESTS)]
    await asyncio.sleep(0)
    for task in crowd[::2]:
        task.cancel()
    await asyncio.wait_for(asyncio.gather(*crowd, return_exceptions=True), 1)
    await asyncio.sleep(0)
    await asyncio.wait_for(admission.wait(), 1)
