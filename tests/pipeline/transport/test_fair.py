from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.transport.fair import FairClock, FairQueue, Turns

WORK = st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(1, 9))  # tenant, request, cost


def test_who_comes_later_with_little_does_not_wait_for_who_has_much() -> None:
    clock: FairClock[str] = FairClock()
    work = [(clock.stamp("many", 1.0), "many", number) for number in range(64)]
    done = []
    for _ in range(10):
        work.sort()
        start, owner, number = work.pop(0)
        clock.advance(start)
        done.append((owner, number))
    work.append((clock.stamp("one", 1.0), "one", 0))
    work.sort()
    assert [owner for _, owner, _ in work[:2]].count("one") == 1
    assert done == [("many", number) for number in range(10)], "one's own work keeps its order"


def test_owners_with_much_to_do_get_equal_shares_by_cost() -> None:
    clock: FairClock[str] = FairClock()
    costs = {"small": 1.0, "large": 4.0}
    work = sorted((clock.stamp(owner, cost), owner) for owner, cost in costs.items() for _ in range(400))
    share = {"small": 0.0, "large": 0.0}
    for start, owner in work[:250]:
        clock.advance(start)
        share[owner] += costs[owner]
    assert abs(share["small"] - share["large"]) <= 4.0


def test_nobody_saves_up_turns_and_nothing_is_remembered_for_ever() -> None:
    clock: FairClock[int] = FairClock()
    rng = random.Random(0)
    for owner in range(20_000):
        clock.advance(clock.stamp(owner, rng.random()))
        clock.advance(clock.stamp(-1, 1.0))
    assert clock.stamp(1, 1.0) >= clock.stamp(-1, 1.0) - 1.0
    assert len(clock._ends) < 3000


def test_a_tenant_with_one_piece_does_not_wait_for_who_has_many_requests() -> None:
    queue: FairQueue[str, str] = FairQueue()
    for request in range(50):
        for piece in range(8):
            queue.push("flood", f"r{request}", 1.0, (request, piece), f"flood {request}.{piece}")
    first = [queue.pop() for _ in range(4)]
    assert first == [f"flood {request}.0" for request in range(4)], "requests take turns"
    queue.push("other", "o", 1.0, (99, 0), "other")
    assert "other" in [queue.pop() for _ in range(2)]


def test_what_nobody_wants_any_more_costs_its_tenant_no_turn() -> None:
    queue: FairQueue[str, str] = FairQueue()
    for number in range(10):
        queue.push("a", "r", 1.0, number, f"a{number}")
    for _ in range(9):
        queue.drop()
    queue.push("b", "r", 1.0, 99, "b")
    assert (queue.peek(), queue.pop(), queue.pop(), queue.peek()) == ("a9", "a9", "b", None)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORK, min_size=1, max_size=120))
def test_everything_comes_out_once_and_tenants_get_equal_shares(pushed: list[tuple[str, int, int]]) -> None:
    queue: FairQueue[int, int] = FairQueue()
    for number, (tenant, request, cost) in enumerate(pushed):
        queue.push(tenant, request, cost, number, number)
    left = Counter(tenant for tenant, *_ in pushed)
    served, popped = dict.fromkeys(left, 0), []
    while (item := queue.peek()) is not None:
        assert queue.pop() == item
        popped.append(item)
        tenant, _, cost = pushed[item]
        served[tenant] += cost
        left[tenant] -= 1
        backlogged = [served[name] for name in left if left[name]]
        assert not backlogged or max(backlogged) - min(backlogged) <= 9, "as far apart as one piece of work"
    assert sorted(popped) == list(range(len(pushed)))


def test_turns_are_arranged_as_they_will_be_given() -> None:
    turns: Turns[str] = Turns()
    work = [("a", 4.0), ("a", 1.0), ("b", 1.0), ("b", 1.0), ("a", 1.0), ("c", 9.0)]
    assert turns.arrange(work) == [0, 2, 5, 3, 1, 4]
    turns.charge("a", 4.0)
    assert turns.arrange(work)[:3] == [2, 5, 3]
    for owner in range(5000):
        turns.charge(str(owner), 1.0)
    assert len(turns._ends) < 3000
