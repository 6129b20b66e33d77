"""Rank 0 with embeddings that a carrier has copied to its node: whose leases they are, and whose death costs
what."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from pipeline.wire.base import Order, PoolOpened
from pipeline.wire.carrying import OldestAwaited
from pipeline.wire.clients import Interrupted
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import LeaseReleased, LeaseSet
from pipeline.wire.generation import EmbeddingReady, GenerateRequest, Via
from pipeline.wire.topology import WorkerId
from tests.chats import CHATS
from tests.engine_rig import NUM_TOKENS, Rig
from tests.fakes import CARRIER_0, VIT_0


@pytest.fixture
def rig(random_checkpoint: Path) -> Iterator[Rig]:
    made = Rig(random_checkpoint, 64)
    made.open_pool()  # the ViT's, for embeddings that need no carrier
    info = msgspec.structs.replace(made.pool.info, pool_id=str(CARRIER_0))
    made.engine.handle(PoolOpened(sender=CARRIER_0, epoch=1, pool=info), 0.0)
    made.engine.intake.epochs = {VIT_0: 1, CARRIER_0: 1}
    yield made
    made.engine.check_integrity()


def carried(rig: Rig, chat: str, request_id: str) -> tuple[GenerateRequest, list[EmbeddingReady]]:
    request, ready = rig.request(CHATS[chat], request_id)
    items = [
        msgspec.structs.replace(
            item,
            chunks=tuple(msgspec.structs.replace(chunk, carriers=(Via(0, 1),)) for chunk in item.chunks),
        )
        for item in request.items
    ]
    copies = [
        msgspec.structs.replace(
            one, sender=CARRIER_0, embeddings=msgspec.structs.replace(one.embeddings, pool_id=str(CARRIER_0))
        )
        for one in ready
    ]
    return msgspec.structs.replace(request, items=tuple(items)), copies


def die(rig: Rig, worker: WorkerId) -> list[str]:
    """Returns the ids of the interrupted requests."""
    rig.engine.intake.epochs = {VIT_0: 1, CARRIER_0: 1, worker: 2}
    rig.engine.on_death(WorkerState(worker, 2, False), 0.0)
    return [told.request_id for told in rig.publisher.take(Interrupted)]


def test_a_copy_is_read_and_released_at_its_carrier(rig: Rig) -> None:
    request, ready = carried(rig, "one picture", "r")
    rig.engine.handle(ready[0], 0.0)  # before its request
    rig.engine.handle(request, 0.0)
    rig.engine.tick(0.0)
    assert [message.lease_ids for message in rig.carrier.take(LeaseSet)] == [(ready[0].lease_id,)]
    assert [message.lease_ids for message in rig.vit.take(LeaseSet)] == [()]
    rig.run()
    assert len(rig.tokens("r")) == NUM_TOKENS
    assert [message.lease_ids for message in rig.carrier.take(LeaseReleased)] == [(ready[0].lease_id,)]
    assert rig.vit.take() == []


def test_the_carrier_is_told_what_is_awaited_first(rig: Rig) -> None:
    request, ready = carried(rig, "three pictures between texts", "r")
    rig.engine.handle(rig.request(CHATS["one picture"], "near")[0], 0.0)
    rig.engine.handle(request, 0.0)
    rig.engine.tick(0.0)
    for message in ready:
        rig.engine.handle(message, 0.0)
        rig.engine.step(0.0)  # once a step, however many came before it
    told = [message.order for message in rig.carrier.take(OldestAwaited)]
    places = [Order(request.arrival, place) for place in range(3)]
    assert told == [*places, None]


@pytest.mark.parametrize("dead", [CARRIER_0, VIT_0])
def test_a_death_costs_what_is_awaited_and_a_carriers_what_it_holds(rig: Rig, dead: WorkerId) -> None:
    for name, num_ready in (("awaits", 2), ("has all", 3)):
        request, ready = carried(rig, "three pictures between texts", name)
        rig.engine.handle(request, 0.0)
        for message in ready[:num_ready]:
            rig.engine.handle(message, 0.0)
    rig.carrier.take()
    interrupted = die(rig, dead)
    assert set(interrupted) == ({"awaits"} if dead == VIT_0 else {"awaits", "has all"})
    assert rig.engine.runner.pools.knows(str(CARRIER_0), 1) == (dead == VIT_0)
    if dead == CARRIER_0:
        assert rig.carrier.take(LeaseReleased) == [], "its successor has never heard of them"
    rig.run()


@pytest.mark.parametrize("dead", [CARRIER_0, VIT_0])
def test_what_was_routed_before_a_death_is_interrupted_when_it_comes_behind(rig: Rig, dead: WorkerId) -> None:
    request, _ = carried(rig, "one picture", "r")
    assert die(rig, dead) == []
    rig.engine.handle(request, 0.0)
    (told,) = rig.publisher.take(Interrupted)
    assert told.reason == f"{dead} died"
