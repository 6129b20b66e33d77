"""What a ViT encodes, in which order and for whom: pure."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence, Set

import pytest

from pipeline.families import EmbeddingSpec
from pipeline.transport.slots import ALIGNMENT, SlotAllocator
from pipeline.wire.base import ChunkKey, GridTHW, Order
from pipeline.wire.handles import TensorHandle
from pipeline.wire.topology import Role, WorkerId
from workers.vit.batcher import Batcher, LeaseGone, NeedPixels, PixelsDone, Ready, Refused

LLM_0 = WorkerId(Role.LLM)
GRID = GridTHW(1, 4, 4)  # 16 patches, 4 tokens
TOKEN_BYTES = ALIGNMENT // 4  # so that one chunk is one unit of the pool


def embedding_of(grid: GridTHW) -> EmbeddingSpec:
    return EmbeddingSpec(grid.num_patches // 4, TOKEN_BYTES, "uint8")


def make(chunks: int = 8, alone: Set[str] = frozenset()) -> Batcher:
    allocator = SlotAllocator(chunks * ALIGNMENT, ALIGNMENT, 64)
    return Batcher(allocator, embedding_of, lambda name: name in alone)


def key(request: str, item: int = 0) -> ChunkKey:
    return ChunkKey(request, 1, item, 0)


def pixels(number: int = 0) -> TensorHandle:
    return TensorHandle("preprocess.0", 1, number, 1, 0, (1, 56, 56, 3), "uint8")


def ask(
    made: Batcher,
    name: str,
    mm_hash: bytes,
    arrival: int = 1,
    item: int = 0,
    with_pixels: bool = False,
    grid: GridTHW = GRID,
) -> list[object]:
    return list(
        made.on_request(
            key(name, item), Order(arrival, item), mm_hash, grid, pixels() if with_pixels else None
        )
    )


def encode(made: Batcher, max_patches: int = 1000) -> list[object]:
    return list(made.on_encoded(made.next_batch(max_patches)))


def test_a_new_chunk_is_asked_for_encoded_leased_and_kept() -> None:
    made = make()
    assert ask(made, "a", b"h") == [NeedPixels(key("a"))]
    assert made.next_batch(1000) == []
    assert ask(made, "a", b"h", with_pixels=True) == []
    ready, done = encode(made)
    assert isinstance(ready, Ready)
    assert (ready.key, ready.feature.value.num_rows) == (key("a"), 4)
    assert done == PixelsDone(key("a"))
    again = ask(made, "b", b"h", 2)
    assert [type(action) for action in again] == [Ready, PixelsDone]
    assert made.cache.num_leases == 2
    assert (made.num_queries, made.num_hits, made.cache.num_kept) == (2, 1, 1)
    made.check_integrity()


def test_pixels_that_follow_are_not_asked_for() -> None:
    made = make()
    assert made.on_request(key("a"), Order(1, 0), b"h", GRID, None, will_follow=True) == []
    assert ask(made, "b", b"h", 2) == [], "one supplier is enough"
    assert ask(made, "a", b"h", with_pixels=True) == []
    assert [action.key for action in encode(made) if isinstance(action, Ready)] == [key("a"), key("b")]
    made.check_integrity()


def test_when_pixels_that_were_to_follow_are_cancelled_another_is_asked_for_them() -> None:
    made = make()
    made.on_request(key("a"), Order(1, 0), b"h", GRID, None, will_follow=True)
    ask(made, "b", b"h", 2)
    assert made.on_cancel([key("a")]) == [PixelsDone(key("a")), NeedPixels(key("b"))]


def test_a_chunk_is_leased_again_while_it_is_there_and_never_encoded_for_it() -> None:
    made = make(chunks=2)
    ask(made, "a", b"h")
    ask(made, "a", b"h", with_pixels=True)
    (first, _) = encode(made)
    assert isinstance(first, Ready)
    (again,) = made.on_lease_request(key("a"), b"h")
    assert isinstance(again, Ready)
    assert again.lease_id != first.lease_id
    made.cache.release([first.lease_id, again.lease_id])
    made.cache.evict_one()
    assert made.on_lease_request(key("a"), b"h") == [LeaseGone(key("a"))]
    assert made.num_pending == 0
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
    assert {action.key.request_id for action in actions if isinstance(action, PixelsDone)} == {
        "a",
        "b",
        "c",
        "d",
    }
    assert len({action.lease_id for action in actions if isinstance(action, Ready)}) == 4


def test_a_suspect_has_a_batch_of_its_own_as_soon_as_it_is_known_as_one() -> None:
    alone: set[str] = set()
    made = make(alone=alone)
    for arrival, name in enumerate(("a", "shared", "b", "c"), start=1):
        ask(made, name, name[:1].encode(), arrival)
        ask(made, name, name[:1].encode(), arrival, with_pixels=True)
    ask(made, "late", b"s", 5)  # waits for the same chunk
    alone.add("late")
    batches = [made.next_batch(1000) for _ in range(4)]
    assert [[pending.mm_hash for pending in batch] for batch in batches] == [[b"a"], [b"s"], [b"b", b"c"], []]


def test_pixels_that_come_for_nothing_are_given_back() -> None:
    made = make()
    ask(made, "a", b"h")
    ask(made, "a", b"h", with_pixels=True)
    assert ask(made, "c", b"h", 2, with_pixels=True) == [PixelsDone(key("c"))], "it never asked"
    ask(made, "b", b"h", 2)
    assert ask(made, "b", b"h", 2, with_pixels=True) == [], "they are released with its answer"
    assert PixelsDone(key("b")) in encode(made)
    assert ask(made, "a", b"h", with_pixels=True) == [PixelsDone(key("a"))], (
        "an answered chunk is not leased again"
    )
    assert ask(made, "z", b"gone", with_pixels=True) == [PixelsDone(key("z"))], "cancelled meanwhile"


def test_when_the_supplier_is_cancelled_the_next_one_is_asked() -> None:
    made = make()
    ask(made, "a", b"h", 1)
    ask(made, "b", b"h", 2)
    assert made.on_cancel([key("a")]) == [PixelsDone(key("a")), NeedPixels(key("b"))]
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
    younger = made.cache.lease(made.cache.get(b"h"), LLM_0)  # type: ignore[arg-type]
    made.cache.reconcile(LLM_0, [], lease)
    assert made.cache.num_leases == 2, "once is not enough"
    made.cache.reconcile(LLM_0, [lease], lease)
    made.cache.reconcile(LLM_0, [], lease)
    assert made.cache.num_leases == 2, "it was seen in between"
    made.cache.reconcile(LLM_0, [], lease)
    assert made.cache.num_leases == 1, f"{younger} may still be under way"
    made.cache.release([lease, younger, 999])
    assert made.cache.num_leases == 0
    made.check_integrity()


@pytest.mark.parametrize("order", ["reversed", "shuffled"])
def test_half_arrived_requests_cannot_starve_each_other(order: str) -> None:
    """8 requests of 64 small pictures, a pool of 3 chunks, pixels in reverse order, an LLM that needs items
    in order."""
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


def test_the_suppliers_pixels_come_back_though_it_left_first() -> None:
    made = make()
    ask(made, "a", b"h", 1)
    ask(made, "a", b"h", 1, with_pixels=True)
    ask(made, "b", b"h", 2)
    assert made.on_cancel([key("a")]) == []
    assert set(made.on_cancel([key("b")])) == {PixelsDone(key("a")), PixelsDone(key("b"))}
    made.check_integrity()


def test_a_shared_chunk_in_the_reserve_is_leased_to_one_at_a_time() -> None:
    """Else a younger request would pin the reserve while it waits for what only the reserve can hold."""
    made = make(3)
    leases: dict[ChunkKey, int] = {}
    seen: list[object] = []

    def run(actions: list[object]) -> None:
        for action in [*actions, *encode(made), *made.poll()]:
            seen.append(action)
            if isinstance(action, Ready):
                leases[action.key] = action.lease_id

    for arrival, (name, hashes) in enumerate(
        {"o": b"xz", "y": b"wx", "r": b"ab", "s": b"cd"}.items(), start=1
    ):
        for item in (0, 1):
            ask(made, name, hashes[item : item + 1], arrival, item)
    run(ask(made, "r", b"b", 3, 1, with_pixels=True))
    run(ask(made, "s", b"d", 4, 1, with_pixels=True))
    assert set(leases) == {key("r", 1), key("s", 1)}, "the general part is full of what nobody can read yet"
    run(ask(made, "o", b"x", 1, 0, with_pixels=True))
    assert key("o", 0) in leases
    assert key("y", 1) not in leases, "it needs w first"
    made.cache.release([leases[key("o", 0)]])
    for name, arrival, item, mm_hash in (("o", 1, 1, b"z"), ("y", 2, 0, b"w")):
        run(ask(made, name, mm_hash, arrival, item, with_pixels=True))
        assert key(name, item) in leases, "the reserve came free for it"
        made.cache.release([leases[key(name, item)]])
    assert NeedPixels(key("y", 1)) in seen, "x was evicted meanwhile"
    run(ask(made, "y", b"x", 2, 1, with_pixels=True))
    assert key("y", 1) in leases
    made.check_integrity()


@pytest.mark.parametrize("seed", range(40))
def test_random_requests_sharing_pictures_all_finish(seed: int) -> None:
    """Random hashes shared between requests, cancellations, pixels in any order, a tiny pool: nothing hangs,
    nothing leaks."""
    rng = random.Random(seed)
    made = make(rng.choice((3, 4, 6)))
    wanted = {f"r{r}": deque(range(rng.randint(1, 6))) for r in range(6)}
    hashes = {(name, item): bytes([rng.randrange(8)]) for name, items in wanted.items() for item in items}
    need: list[tuple[str, int]] = []  # those asked for pixels
    supplied: set[ChunkKey] = set()  # pixels sent and not given back
    over: set[ChunkKey] = set()
    held: dict[str, dict[int, int]] = {name: {} for name in wanted}
    dead: set[str] = set()

    def act(actions: list[object]) -> None:
        for action in actions:
            match action:
                case NeedPixels(k):
                    assert k not in over, "preprocess has forgotten it"
                    need.append((k.request_id, k.item))
                case PixelsDone(k):
                    supplied.discard(k)
                    over.add(k)
                case Ready(k, lease_id, _):
                    assert k.item not in held[k.request_id], "one lease for each ask"
                    held[k.request_id][k.item] = lease_id
                case other:
                    raise AssertionError(other)

    for r, (name, items) in enumerate(wanted.items()):
        for item in items:
            act(ask(made, name, hashes[name, item], r, item))
            if rng.random() < 0.3:
                need.append((name, item))  # preprocess may decode without being asked
    for _ in range(600):
        if need and rng.random() < 0.7:
            name, item = need.pop(rng.randrange(len(need)))
            if name not in dead and key(name, item) not in over:
                supplied.add(key(name, item))
                act(ask(made, name, hashes[name, item], int(name[1:]), item, with_pixels=True))
        if rng.random() < 0.02 and len(dead) < 3:
            victim = rng.choice(sorted(set(wanted) - dead))
            dead.add(victim)
            act(list(made.on_cancel([key(victim, item) for item in range(6)])))
            made.cache.release(held[victim].values())
            wanted[victim].clear()
        act(list(made.poll()))
        act(encode(made, 32))
        for name, items in wanted.items():
            while items and items[0] in held[name]:
                made.cache.release([held[name][items.popleft()]])
        made.check_integrity()
        if not any(wanted.values()) and not need:
            break
    act(list(made.poll()))
    assert not any(wanted.values()), "somebody waits for ever"
    assert made.num_pending == 0
    assert not supplied, "pixels were never given back"


def test_a_request_of_many_chunks_does_not_hold_up_one_of_one() -> None:
    made = make(chunks=100)
    for item in range(60):
        ask(made, "many", bytes([item]), 1, item)
        ask(made, "many", bytes([item]), 1, item, with_pixels=True)
    order: list[str] = []

    def encode_one() -> None:
        batch = made.next_batch(16)
        order.extend(pending.oldest.request_id for pending in batch)
        made.on_encoded(batch)

    for _ in range(10):
        encode_one()
    ask(made, "one", b"one", 2)
    ask(made, "one", b"one", 2, with_pixels=True)
    encode_one()
    encode_one()
    assert order.count("one") == 1, "it goes next or next but one"
    while made.num_pending:
        encode_one()
    assert len(order) == 61
    made.check_integrity()


def test_with_preprocess_all_goes_that_waits_for_pixels_and_what_is_encoded_stays() -> None:
    made = make()
    ask(made, "a", b"old")
    ask(made, "a", b"old", with_pixels=True)
    encode(made)
    for number, name in enumerate("bc"):
        ask(made, name, b"new", 2 + number)
    ask(made, "d", b"other", 5, with_pixels=False)
    ask(made, "d", b"other", 5, with_pixels=True)
    made.forget_all()
    assert made.num_pending == 0
    made.check_integrity()
    assert [type(action) for action in ask(made, "e", b"old", 9)] == [Ready, PixelsDone]


def test_with_a_group_its_leases_and_requests_go() -> None:
    made = make()
    mine, theirs = ChunkKey("a", 1, 0, 0, lead=0), ChunkKey("b", 1, 0, 0, lead=2)
    for place, name in enumerate((mine, theirs)):
        made.on_request(name, Order(place, 0), b"h", GRID, None)
        made.on_request(name, Order(place, 0), b"h", GRID, pixels(place))
    encode(made)
    waiting = ChunkKey("c", 1, 0, 0, lead=0)
    made.on_request(waiting, Order(3, 0), b"i", GRID, None)
    assert made.cache.num_leases == 2
    assert made.forget_group(0) == [PixelsDone(waiting)]
    assert made.cache.num_leases == 1
    assert made.num_pending == 0
    made.check_integrity()


def test_a_tenants_flood_does_not_come_before_anothers_picture() -> None:
    made = make(chunks=40)
    grants: list[str] = []

    def supply(name: str, arrival: int, tenant: str) -> None:
        for given in (None, pixels()):
            made.on_request(key(name), Order(arrival, 0), name.encode(), GRID, given, tenant=tenant)

    for number in range(30):  # each a request of its own: turns by request alone would not help
        supply(f"flood-{number}", number, "flood")
    first = made.next_batch(1)
    supply("other", 99, "other")
    for _ in range(2):
        grants += [pending.tenant for pending in made.next_batch(1)]
    assert "other" in grants
    made.on_encoded(first)


def test_who_has_waited_for_an_encode_is_told_so_though_the_reserve_makes_it_wait_longer() -> None:
    made = make(3)
    for name, mm_hash in (("r", b"a"), ("s", b"b")):
        ask(made, name, mm_hash, 8)
        ask(made, name, mm_hash, 8, with_pixels=True)
    assert {(ready.key, ready.was_encoded) for ready in readies(encode(made))} == {
        (key("r"), True), (key("s"), True),
    }  # fmt: skip
    for arrival, (name, mm_hash) in enumerate((("o", b"x"), ("between", b"q"), ("y", b"x")), start=1):
        ask(made, name, mm_hash, arrival)
    ask(made, "o", b"x", 1, with_pixels=True)
    [first] = readies(encode(made))
    assert (first.key, first.was_encoded) == (key("o"), True), "the general part is full: x is in the reserve"
    assert readies(ask(made, "z", b"x", 4)) == []
    made.cache.release([first.lease_id])
    assert {ready.key: ready.was_encoded for ready in readies(made.on_cancel([key("between")]))} == {
        key("y"): True, key("z"): False,
    }, "z came when x was cached"  # fmt: skip
    [known] = readies(ask(made, "t", b"a", 9))
    assert not known.was_encoded
    made.check_integrity()


def readies(actions: Sequence[object]) -> list[Ready]:
    return [action for action in actions if isinstance(action, Ready)]
