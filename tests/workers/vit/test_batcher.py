"""What a ViT encodes, in which order and for whom: pure."""

from __future__ import annotations

import random
from collections import deque

import pytest

from pipeline.messages import ChunkKey, GridTHW
from pipeline.slots import ALIGNMENT, Order, SlotAllocator
from pipeline.tensors import TensorHandle
from workers.vit.batcher import Batcher, NeedPixels, PixelsDone, Ready, Refused

GRID = GridTHW(1, 4, 4)  # 16 patches, 4 tokens
TOKEN_BYTES = ALIGNMENT // 4  # so that one chunk is one unit of the pool


def make(chunks: int = 8) -> Batcher:
    return Batcher(SlotAllocator(chunks * ALIGNMENT, ALIGNMENT, 64), TOKEN_BYTES, 2)


def key(request: str, item: int = 0) -> ChunkKey:
    return ChunkKey(request, 1, item, 0)


def pixels(number: int = 0) -> TensorHandle:
    return TensorHandle("preprocess.0", 1, number, 1, 0, (1, 56, 56, 3), "uint8")


def ask(made: Batcher, name: str, mm_hash: bytes, arrival: int = 1, item: int = 0, with_pixels: bool = False, grid: GridTHW = GRID) -> list[object]:
    return list(made.on_request(key(name, item), Order(arrival, item), mm_hash, grid, pixels() if with_pixels else None))


def encode(made: Batcher, max_patches: int = 1000) -> list[object]:
    return list(made.on_encoded(made.next_batch(max_patches)))


def test_a_new_chunk_is_asked_for_encoded_leased_and_kept() -> None:
    made = make()
    assert ask(made, "a", b"h") == [NeedPixels(key("a"))]
    assert made.next_batch(1000) == []
    assert ask(made, "a", b"h", with_pixels=True) == []
    ready, done = encode(made)
    assert isinstance(ready, Ready)
    assert (ready.key, ready.feature.num_tokens) == (key("a"), 4)
    assert done == PixelsDone(key("a"))
    again = ask(made, "b", b"h", 2)
    assert [type(action) for action in again] == [Ready, PixelsDone]
    assert made.cache.num_leases == 2
    made.check_integrity()


def test_requests_for_one_hash_share_one_encode() -> None:
    made = make()
    assert ask(made, "a", b"h", 1) == [NeedPixels(key("a"))]
    assert ask(made, "b", b"h", 2) == []
    ask(made, "a", b"h", 1, with_pixels=True)
    assert ask(made, "c", b"h", 3) == []
    batch = made.next_batch(1000)
    assert len(batch) == 1
    assert ask(made, "d", b"h", 4) == [], "even while it is being encoded"
    actions = made.on_encoded(batch)
    assert {action.key.request_id for action in actions if isinstance(action, Ready)} == {"a", "b", "c", "d"}
    assert {action.key.request_id for action in actions if isinstance(action, PixelsDone)} == {"a", "b", "c", "d"}
    assert len({action.lease_id for action in actions if isinstance(action, Ready)}) == 4


def test_pixels_that_come_for_nothing_are_given_back() -> None:
    made = make()
    ask(made, "a", b"h")
    ask(made, "a", b"h", with_pixels=True)
    assert ask(made, "b", b"h", 2, with_pixels=True) == [PixelsDone(key("b"))]
    encode(made)
    assert ask(made, "a", b"h", with_pixels=True) == [PixelsDone(key("a"))], "an answered chunk is not leased again"
    assert ask(made, "z", b"gone", with_pixels=True) == [PixelsDone(key("z"))], "cancelled meanwhile"


def test_when_the_supplier_is_cancelled_the_next_one_is_asked() -> None:
    made = make()
    ask(made, "a", b"h", 1)
    ask(made, "b", b"h", 2)
    assert made.on_cancel([key("a")]) == [NeedPixels(key("b"))]
    ask(made, "b", b"h", 2, with_pixels=True)
    assert [action.key.request_id for action in encode(made) if isinstance(action, Ready)] == ["b"]
    made.check_integrity()


@pytest.mark.parametrize("stage", ["announced", "pixels", "encoding"])
def test_cancelling_the_only_one_leaves_nothing_behind(stage: str) -> None:
    made = make()
    ask(made, "a", b"h")
    if stage != "announced":
        ask(made, "a", b"h", with_pixels=True)
    batch = made.next_batch(1000) if stage == "encoding" else []
    actions = made.on_cancel([key("a"), key("a"), key("never")])
    if stage == "encoding":
        assert actions == [], "the pixels are being read"
        assert made.on_encoded(batch) == [PixelsDone(key("a"))]
    else:
        assert actions == [PixelsDone(key("a"))]
    assert made.num_pending == 0
    assert made.cache.num_leases == 0
    made.check_integrity()


def test_batches_are_bounded_in_patches_and_oldest_first() -> None:
    made = make(20)
    for arrival in (3, 1, 2):
        ask(made, f"r{arrival}", bytes([arrival]), arrival)
        ask(made, f"r{arrival}", bytes([arrival]), arrival, with_pixels=True)
    first = made.next_batch(40)
    assert [pending.order.arrival for pending in first] == [1, 2]
    assert [pending.order.arrival for pending in made.next_batch(1)] == [3], "one always goes, however large"
    assert made.next_batch(1000) == []


def test_a_chunk_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    made = make()
    refused, done = ask(made, "a", b"h", grid=GridTHW(1, 8, 8))
    assert isinstance(refused, Refused)
    assert f"{16 * TOKEN_BYTES} bytes" in refused.reason
    assert done == PixelsDone(key("a"))


def test_a_failed_chunk_frees_its_slot() -> None:
    made = make()
    ask(made, "a", b"h")
    ask(made, "a", b"h", with_pixels=True)
    (pending,) = made.next_batch(1000)
    assert made.on_failed(pending, "broken") == [Refused(key("a"), "broken"), PixelsDone(key("a"))]
    assert made.cache._allocator.num_used == 0
    made.check_integrity()


def test_leased_chunks_are_never_evicted_and_others_least_recently_used_first() -> None:
    made = make(4)
    leases = {}
    for number in range(3):
        ask(made, "r", bytes([number]), 1, number)
        ask(made, "r", bytes([number]), 1, number, with_pixels=True)
        leases[number] = next(action.lease_id for action in encode(made) if isinstance(action, Ready))
    made.cache.release([leases[0], leases[1]])
    made.cache.get(bytes([0]))  # used again: now 1 is the oldest without a lease
    for number in (10, 11):
        ask(made, "n", bytes([number]), 2, number)
        ask(made, "n", bytes([number]), 2, number, with_pixels=True)
    assert len(made.next_batch(1000)) == 2
    assert made.cache.get(bytes([1])) is None
    assert made.cache.get(bytes([2])) is not None
    made.check_integrity()


def test_a_lost_release_heals_after_two_lease_sets() -> None:
    made = make()
    ask(made, "a", b"h")
    ask(made, "a", b"h", with_pixels=True)
    lease = next(action.lease_id for action in encode(made) if isinstance(action, Ready))
    younger = made.cache.lease(made.cache.get(b"h"))  # type: ignore[arg-type]
    made.cache.reconcile([], lease)
    assert made.cache.num_leases == 2, "once is not enough"
    made.cache.reconcile([lease], lease)
    made.cache.reconcile([], lease)
    assert made.cache.num_leases == 2, "it was seen in between"
    made.cache.reconcile([], lease)
    assert made.cache.num_leases == 1, f"{younger} may still be under way"
    made.cache.release([lease, younger, 999])
    assert made.cache.num_leases == 0
    made.check_integrity()


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_half_arrived_requests_cannot_starve_each_other(order: str) -> None:
    """8 requests of 64 small pictures, a pool of 3 chunks, pixels in reverse order, an LLM that needs items in order."""
    made = make(3)
    wanted = {f"r{r}": deque(range(64)) for r in range(8)}  # items that the LLM has not read yet
    announced = [(r, i) for r in range(8) for i in range(64)]
    for r, i in announced:
        assert ask(made, f"r{r}", bytes([r, i]), r, i) == [NeedPixels(key(f"r{r}", i))]
    late = list(reversed(announced))
    if order == "shuffled":
        random.Random(0).shuffle(late)
    held: dict[str, dict[int, int]] = {name: {} for name in wanted}
    steps = 0
    while any(wanted.values()):
        steps += 1
        assert steps < 5000, "the pool is stuck"
        for _ in range(20):
            if late:
                r, i = late.pop(0)
                ask(made, f"r{r}", bytes([r, i]), r, i, with_pixels=True)
        for action in encode(made, 16):
            if isinstance(action, Ready):
                held[action.key.request_id][action.key.item] = action.lease_id
        for name, items in wanted.items():
            while items and items[0] in held[name]:
                made.cache.release([held[name].pop(items.popleft())])
        made.check_integrity()
    assert made.num_pending == 0
