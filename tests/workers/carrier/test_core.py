"""What a carrier sends to whom, and when: pixels to ViTs of its node, embeddings to its leads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.wire.base import Order, PoolOpened
from pipeline.wire.carrying import OldestAwaited, ReadRequest
from pipeline.wire.encoding import (
    CancelEncode,
    EncodeMiss,
    EncodeRequest,
    LeaseReleased,
    LeaseSet,
    PixelsCopied,
    PixelsReleased,
)
from pipeline.wire.generation import EmbeddingReady, LeaseRefused
from tests.fakes import LLM_0, PREPROCESS
from tests.workers.carrier.rig import (
    CARRIER,
    FAR_VIT,
    HEAD_CARRIER,
    VIT,
    Rig,
    encode_request,
    handle,
    key,
    kinds,
    opened,
)
from workers.carrier.reads import MAX_UNDER_WAY, RETRY_S

A, B, C = key("a"), key("b"), key("c")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.fixture
def small() -> Iterator[Rig]:
    """Room for one chunk, and a reserve for one."""
    made = Rig(room=2)
    yield made
    made.close()


def released(rig: Rig) -> list[int]:
    return [one for message in rig.far_vit.take(LeaseReleased) for one in message.lease_ids]


def tell_awaited(rig: Rig, order: Order | None) -> None:
    rig.core.on_carry(OldestAwaited(sender=LLM_0, epoch=1, order=order))


def free(rig: Rig, *lease_ids: int) -> None:
    rig.core.on_carry(LeaseReleased(sender=LLM_0, epoch=1, lease_ids=lease_ids))


# Pixels.


def test_pixels_are_copied_and_the_copy_lives_until_the_vit_releases_it(rig: Rig) -> None:
    rig.encode(A)
    (announced,) = rig.vit.take()
    assert (announced.pixels, announced.sender, announced.will_follow) == (None, CARRIER, True)
    rig.encode(A, with_pixels=True)
    assert rig.vit.take() == [], "not before they are there"
    (read,) = rig.transport.begun.values()
    assert (read.source, read.node) == (handle(PREPROCESS, 0), 0)
    rig.end()
    (sent,) = rig.vit.take()
    assert (sent.pixels.pool_id, sent.pixels.shape) == ("carrier.1", (64, 4))
    assert sent.sent_at == 0.0, "the clocks of two machines differ"
    assert rig.feedback.take() == [PixelsCopied(sender=CARRIER, epoch=1, key=A)]
    assert rig.pixels.allocator.num_used == 1
    rig.release(A)
    rig.release(A)
    assert rig.pixels.allocator.num_used == 0
    assert rig.feedback.take() == [PixelsReleased(sender=CARRIER, epoch=1, key=A)] * 2


def test_what_holds_no_tensor_does_not_wait_for_a_read(rig: Rig) -> None:
    rig.encode(A)
    rig.encode(A, with_pixels=True)
    rig.encode(B, 2)
    rig.cancel(B)
    assert kinds(rig.vit.take()) == ["EncodeRequest", "EncodeRequest", "CancelEncode"]


@pytest.mark.parametrize("is_read", [False, True])
def test_a_request_that_is_cancelled_meanwhile_is_not_passed_on(rig: Rig, is_read: bool) -> None:
    rig.encode(A)
    rig.encode(A, with_pixels=True)
    if is_read:
        rig.end()
    rig.cancel(A)
    sent = kinds(rig.vit.take())
    assert sent == ["EncodeRequest", *["EncodeRequest"] * is_read, "CancelEncode"]
    assert rig.pixels.allocator.num_used == 1, "it may still be written, or read"
    if is_read:
        rig.release(A)
    else:
        rig.end()
    assert rig.vit.take() == []
    assert rig.pixels.allocator.num_used == 0
    rig.encode(A, with_pixels=True)  # it was under way
    assert kinds(rig.feedback.take())[-1] == "PixelsReleased"


def test_pixels_that_a_vit_misses_are_sent_again_from_here(rig: Rig) -> None:
    rig.encode(A)
    rig.miss(A)
    assert kinds(rig.feedback.take()) == ["EncodeMiss"], "preprocess has them"
    rig.encode(A, with_pixels=True)
    rig.miss(A)
    assert rig.feedback.take() == [], "they are on their way"
    rig.end()
    first = rig.vit.take()[-1]
    rig.feedback.take()
    rig.miss(A)
    assert (rig.vit.take(), rig.feedback.take()) == ([first], [])
    rig.release(A)


def test_pixels_that_are_gone_are_asked_for_again(rig: Rig) -> None:
    rig.encode(A)
    rig.encode(A, with_pixels=True)
    rig.end(is_there=False)
    assert rig.feedback.take() == [EncodeMiss(sender=CARRIER, epoch=1, key=A)]
    assert rig.pixels.allocator.num_used == 0
    rig.encode(A, with_pixels=True)
    rig.end()
    assert kinds(rig.vit.take()) == ["EncodeRequest"] * 2


def test_the_reserve_is_for_the_oldest_chunk_whose_pixels_may_come_last(small: Rig) -> None:
    rig = small
    for number, one in enumerate((A, B, C), 1):
        rig.encode(one, number)
    rig.encode(B, 2, with_pixels=True)
    rig.encode(C, 3, with_pixels=True)
    assert len(rig.transport.begun) == 1, "the rest is for the first request"
    rig.encode(A, 1, with_pixels=True)
    assert [read.on_end.args[0].key for read in rig.transport.begun.values()] == [B, A]  # type: ignore[attr-defined]
    rig.end()
    rig.end()
    rig.release(B)
    assert len(rig.transport.begun) == 1
    rig.end()
    for one in (A, C):
        rig.release(one)


def test_a_dead_vit_reads_nothing_and_its_successor_gets_the_pool(rig: Rig) -> None:
    for one in (A, B, C):
        rig.encode(one)
    rig.encode(A, with_pixels=True)
    rig.end()
    rig.encode(B, with_pixels=True)
    rig.vit.take()
    rig.die(VIT)
    assert kinds(rig.vit.take()) == ["PoolOpened"]
    assert rig.pixels.num_chunks == 0
    rig.encode(key("d"))
    assert rig.vit.take() == [], "meant for the dead ViT"
    rig.core.on_encode(VIT.rank, opened(PREPROCESS, receiver_epoch=2))
    rig.encode(key("e"))
    assert [message.key.request_id for message in rig.vit.take()] == ["e"]
    rig.end()
    assert rig.pixels.allocator.num_used == 0


def test_what_is_meant_for_a_successor_that_is_not_known_yet_is_held(rig: Rig) -> None:
    rig.core.on_encode(VIT.rank, opened(PREPROCESS, receiver_epoch=2))
    rig.encode(A)
    assert rig.vit.take() == []
    rig.die(VIT)
    assert kinds(rig.vit.take()) == ["PoolOpened", "EncodeRequest"]


def test_a_dead_preprocess_leaves_nothing_with_the_vits(rig: Rig) -> None:
    for one in (A, B, C):
        rig.encode(one)
    rig.encode(A, with_pixels=True)
    rig.end()
    rig.encode(B, with_pixels=True)
    rig.vit.take()
    rig.die(PREPROCESS)
    (cancelled,) = rig.vit.take()
    assert isinstance(cancelled, CancelEncode)
    assert set(cancelled.keys) == {A, B, C}
    rig.encode(key("d"))
    assert rig.vit.take() == [], "of the dead preprocess"
    rig.end(is_there=False)
    assert rig.pixels.allocator.num_used == 1, "the ViT may be encoding it"
    rig.release(A)
    assert rig.pixels.num_chunks == rig.pixels.allocator.num_used == 0


def test_the_source_carriers_death_asks_for_pixels_again_and_refuses_embeddings(rig: Rig) -> None:
    rig.encode(A)
    rig.encode(A, with_pixels=True)
    rig.ready(B, 5)
    rig.feedback.take()
    rig.die(HEAD_CARRIER)
    assert kinds(rig.feedback.take()) == ["EncodeMiss"]
    assert rig.llm.take() == [LeaseRefused(sender=CARRIER, epoch=1, key=B)]
    assert released(rig) == [5]
    assert not rig.transport.begun
    assert rig.reads.num_lost == 2


# Embeddings.


def test_an_embedding_is_copied_leased_to_the_lead_and_released_at_its_vit(rig: Rig) -> None:
    rig.ready(A, 5)
    assert (rig.llm.take(), released(rig)) == ([], [])
    rig.end()
    (ready,) = rig.llm.take()
    assert isinstance(ready, EmbeddingReady)
    assert (ready.sender, ready.lease_id, ready.embeddings.pool_id) == (CARRIER, 1, "carrier.1")
    assert (ready.was_encoded, ready.sent_at) == (True, 0.0)
    assert released(rig) == [5]
    rig.ready(B, 6, slot=5)
    (again,) = rig.llm.take()
    assert (again.embeddings, again.lease_id) == (ready.embeddings, 2), "the copy serves both"
    assert (released(rig), rig.embeddings.num_hits) == ([6], 1)
    free(rig, 1, 2, 2)
    assert rig.embeddings.copies.num_leases == 0


def test_of_two_reads_of_one_embedding_the_first_serves_both(rig: Rig) -> None:
    rig.ready(A, 5, slot=9)
    rig.ready(A, 6, slot=9)
    rig.end()
    rig.end()
    first, second = rig.llm.take()
    assert first.embeddings == second.embeddings
    assert rig.embeddings.allocator.num_used == 1
    assert released(rig) == [5, 6]


def test_a_lost_release_heals_and_so_does_one_of_this_carrier(rig: Rig) -> None:
    rig.ready(A, 5)
    rig.core.tick(0.0)
    (held,) = rig.far_vit.take(LeaseSet)
    assert (held.lease_ids, held.last_lease_id) == ((5,), 5)
    rig.end()
    rig.core.tick(1.0)
    (held,) = rig.far_vit.take(LeaseSet)
    assert (held.lease_ids, held.last_lease_id) == ((), 5)
    for number in range(2):
        assert rig.embeddings.copies.num_leases == 1, number
        rig.core.on_carry(LeaseSet(sender=LLM_0, epoch=1, lease_ids=(), last_lease_id=1))
    assert rig.embeddings.copies.num_leases == 0


def test_only_what_its_lead_awaits_may_use_the_reserve(small: Rig) -> None:
    rig = small
    rig.ready(B, 1, arrival=2)
    rig.end()
    rig.ready(C, 2, arrival=3)
    assert not rig.transport.begun, "an older chunk may come"
    tell_awaited(rig, Order(1, 0))
    assert not rig.transport.begun
    rig.ready(A, 3, arrival=1)
    assert len(rig.transport.begun) == 1
    rig.end()
    assert [message.key for message in rig.llm.take()] == [B, A]
    free(rig, 2)
    assert not rig.transport.begun
    tell_awaited(rig, Order(3, 0))
    assert len(rig.transport.begun) == 1
    rig.end()
    free(rig, 1, 3)


def test_a_copy_in_the_reserve_is_leased_to_nobody_else(small: Rig) -> None:
    """A younger request that held it while it waits for room would block the oldest for ever."""
    rig = small
    rig.ready(B, 1, arrival=2)
    rig.end()
    tell_awaited(rig, Order(1, 0))
    rig.ready(A, 2, arrival=1)
    rig.end()
    assert [message.key for message in rig.llm.take()] == [B, A]
    rig.ready(C, 3, arrival=3, slot=2)  # the same content as A
    assert rig.llm.take() == []
    assert rig.embeddings.num_wanted == 1
    free(rig, 1)
    rig.end()
    assert [message.key for message in rig.llm.take()] == [C]
    free(rig, 2, 3)


def test_a_chunk_that_is_needed_again_gets_room_at_once_or_is_refused(small: Rig) -> None:
    rig = small
    rig.ready(A, 1, arrival=None)
    rig.end()
    assert kinds(rig.llm.take()) == ["EmbeddingReady"]
    rig.ready(B, 2, arrival=None)
    assert rig.llm.take() == [LeaseRefused(sender=CARRIER, epoch=1, key=B)]
    assert released(rig) == [1, 2]
    free(rig, 1)
    rig.ready(C, 3, arrival=None)
    assert len(rig.transport.begun) == 1, "the copy of the first was evicted"
    rig.end()


def test_a_stale_embedding_interrupts_the_request(rig: Rig) -> None:
    rig.ready(A, 5)
    rig.end(is_there=False)
    assert rig.llm.take() == [LeaseRefused(sender=CARRIER, epoch=1, key=A)]
    assert (released(rig), rig.embeddings.allocator.num_used) == ([5], 0)


def test_an_embedding_larger_than_the_pools_largest_fails_with_the_numbers(rig: Rig) -> None:
    rig.embeddings.allocator.reserve = 10
    rig.ready(A, 5)
    (failed,) = rig.llm.take()
    assert "256 bytes is larger than 10" in failed.error.message


def test_a_dead_vits_leases_are_void_and_the_copies_stay(rig: Rig) -> None:
    rig.ready(A, 5)
    rig.end()
    rig.ready(B, 6)
    rig.far_vit.take()
    rig.die(FAR_VIT)
    rig.end()
    assert kinds(rig.llm.take()) == ["EmbeddingReady"], "the other's request is interrupted by its lead"
    assert released(rig) == [], "its successor has never heard of them"
    rig.core.on_llm(0, opened(FAR_VIT, epoch=2))
    rig.ready(C, 1)
    rig.end()
    assert released(rig) == [1]
    assert rig.embeddings.allocator.num_used == 2


def test_a_dead_groups_leases_end_and_its_successor_gets_the_pool(rig: Rig) -> None:
    rig.ready(A, 5)
    rig.end()
    rig.ready(B, 6)
    rig.llm.take()
    rig.die(LLM_0)
    rig.end()
    assert kinds(rig.llm.take()) == ["PoolOpened"]
    assert released(rig) == [5, 6]
    assert rig.embeddings.copies.num_leases == 0
    rig.ready(C, 7)
    assert not rig.transport.begun, "meant for the dead group"
    assert released(rig) == [7]


# Reads.


def test_few_reads_at_a_time_and_the_next_begins_when_one_ends(rig: Rig) -> None:
    big = Rig(room=16)
    for number in range(MAX_UNDER_WAY + 3):
        big.ready(key("a", number), number + 1)
    assert len(big.transport.begun) == MAX_UNDER_WAY
    big.end()
    assert len(big.transport.begun) == MAX_UNDER_WAY
    while big.transport.begun:
        big.end()
    assert len(big.llm.take(EmbeddingReady)) == MAX_UNDER_WAY + 3
    big.close()


def test_a_read_whose_bytes_do_not_come_begins_again(rig: Rig) -> None:
    rig.ready(A, 5)
    (first,) = rig.transport.begun
    rig.core.tick(0.0)
    rig.reads.get(first).num_read = 1  # type: ignore[union-attr]
    rig.core.tick(RETRY_S + 1)
    assert list(rig.transport.begun) == [first], "it moves"
    rig.core.tick(2 * RETRY_S + 2)
    (second,) = rig.transport.begun
    assert second != first
    rig.reads.end(first, True)
    assert rig.llm.take() == [], "nobody waits for the first any more"
    rig.end()
    assert kinds(rig.llm.take()) == ["EmbeddingReady"]


def test_messages_of_dead_workers_and_for_others_are_dropped_and_counted(rig: Rig) -> None:
    rig.epochs[HEAD_CARRIER] = 2
    rig.core.on_carry(ReadRequest(sender=HEAD_CARRIER, epoch=1, number=1, source=handle(VIT, 0)))
    rig.core.on_encode(VIT.rank, LeaseReleased(sender=LLM_0, epoch=1, lease_ids=(1,)))
    rig.epochs[PREPROCESS] = 2
    rig.core.on_encode(VIT.rank, encode_request(A, 1))
    rig.core.on_encode(VIT.rank, encode_request(A, 1, epoch=2))
    assert (rig.core.num_stale, rig.core.num_misplaced) == (3, 1)
    assert rig.vit.take(EncodeRequest) == rig.peer.take(PoolOpened) == []
