"""What the loop of rank 0 does beside its core."""

from __future__ import annotations

from typing import Any, cast

from pipeline.transport.ends import Received
from pipeline.wire.clients import Hello
from workers.llm.worker import MAX_MESSAGES_PER_STEP, read_inbox


class Flood:
    """There is always one more."""

    def receive(self) -> Received[Hello]:
        return Received(Hello(client_id=b"c" * 16, protocol=3), [])


def test_a_flood_of_messages_does_not_keep_rank_0_from_its_next_step() -> None:
    handled: list[object] = []
    read_inbox(cast(Any, Flood()), lambda message, now, frames: handled.append(message), 0.0)
    assert len(handled) == MAX_MESSAGES_PER_STEP
