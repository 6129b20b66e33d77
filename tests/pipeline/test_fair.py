from __future__ import annotations

import random

from pipeline.fair import FairClock


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
