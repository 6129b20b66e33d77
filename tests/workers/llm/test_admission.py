"""Turns among tenants in the LLM: floods, priorities, and that nobody waits for ever. Pure."""

from __future__ import annotations

import itertools

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.workers.llm.test_scheduler import arrive, make, scheduler, step
from workers.llm.request import MAX_OVERTAKEN, Request
from workers.llm.scheduler import Scheduler

NAMES = itertools.count()


def add(made: Scheduler, tenant: str, num_tokens: int = 3, max_tokens: int = 4, **options: int) -> Request:
    name = f"{tenant}{next(NAMES)}"
    request = make(name, num_tokens, max_tokens, ignore_eos=True, tenant=tenant, **options)
    made.add(request)
    return request


def run(made: Scheduler) -> list[Request]:
    """One step; those that finished."""
    scheduled, *_ = made.schedule()
    finished = made.update(scheduled, {item.request.key: [1] for item in scheduled if item.is_sampled})
    made.check_integrity()
    return finished


def steps_until_over(made: Scheduler, request: Request, most: int) -> int:
    for number in range(1, most + 1):
        if request in run(made):
            return number
    raise AssertionError(f"not over after {most} steps")


def test_a_flood_that_waits_does_not_come_before_who_comes_later() -> None:
    made = scheduler(max_seqs=2, budget=64)
    for _ in range(100):
        add(made, "flood", max_tokens=1)
    assert [request.tenant for request in run(made)] == ["flood"] * 2
    late = add(made, "other", max_tokens=1)
    assert late in run(made)


def test_a_flood_of_long_answers_gives_places_back() -> None:
    made = scheduler(num_blocks=1000, max_seqs=8, budget=64)
    flood = [add(made, "flood", max_tokens=400) for _ in range(100)]
    run(made)
    assert len(made.running) == 8
    others = [add(made, "other", max_tokens=3) for _ in range(6)]
    run(made)
    assert steps_until_over(made, others[0], 8) <= 4, "as if it were alone"
    for _ in range(3):
        run(made)
        assert sum(request.tenant == "other" for request in made.running) <= 4, "half is its share"
    for request in others:
        if not request.is_over:
            steps_until_over(made, request, 30)
    assert flood[0] in made.running, "the oldest goes on"
    num_preemptions = made.num_preemptions
    for _ in range(20):
        run(made)
    assert (len(made.running), made.num_preemptions) == (8, num_preemptions), "alone it has all of them"


def test_a_flood_gives_blocks_back() -> None:
    made = scheduler(num_blocks=40, max_seqs=8, budget=64)  # 160 tokens
    for _ in range(20):
        add(made, "flood", num_tokens=30, max_tokens=30)
    for _ in range(5):
        run(made)
    late = add(made, "other", num_tokens=40, max_tokens=2)
    assert steps_until_over(made, late, 5) <= 4


def test_who_wants_more_than_its_share_waits_in_line() -> None:
    made = scheduler(num_blocks=40, max_seqs=8, budget=64)
    for _ in range(3):
        add(made, "a", num_tokens=40, max_tokens=8)
    run(made)
    large = add(made, "b", num_tokens=120, max_tokens=2)
    run(made)
    assert made.num_preemptions == 0
    steps_until_over(made, large, 60)


def test_prompts_take_turns_by_tenant() -> None:
    made = scheduler(num_blocks=1000, budget=16)
    for _ in range(4):
        add(made, "flood", num_tokens=200)
    step(made)
    short = add(made, "other", num_tokens=10, max_tokens=1)
    assert steps_until_over(made, short, 3) <= 2


def test_the_heaviest_tenants_youngest_is_preempted() -> None:
    made = scheduler(num_blocks=16, budget=64)  # 64 tokens
    first, second = (add(made, "heavy", num_tokens=15, max_tokens=30) for _ in range(2))
    light = add(made, "light", num_tokens=4, max_tokens=30)
    while not made.num_preemptions:
        run(made)
    assert (first in made.running, light in made.running, second in made.waiting) == (True, True, True)


def test_a_priority_overtakes_so_often_and_no_oftener() -> None:
    made = scheduler(max_seqs=1, budget=64)
    normal = add(made, "a", max_tokens=1)
    order = []
    for _ in range(3 * MAX_OVERTAKEN):
        for _ in range(2):
            add(made, "urgent", max_tokens=1, priority=-(2**31))
        order += run(made)
        if normal in order:
            break
    assert order.index(normal) == MAX_OVERTAKEN


def test_many_who_were_overtaken_do_not_stop_priorities() -> None:
    made = scheduler(max_seqs=1, budget=64)
    for _ in range(100):
        add(made, "a", max_tokens=1)
    order = []
    for _ in range(50):
        add(made, "urgent", max_tokens=1, priority=-1)
        order += [request.tenant for request in run(made)]
    assert 50 / (MAX_OVERTAKEN + 1) - 1 <= order.count("a") <= 50 / (MAX_OVERTAKEN + 1) + 1


LOAD = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.integers(1, 50),
        st.integers(1, 12),
        st.integers(-1, 1),
        st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


# Not shrunk: a case in which somebody waits for ever runs long.
@settings(max_examples=100, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(LOAD, st.integers(1, 4), st.integers(16, 40), st.sampled_from("abd"), st.integers(0, 1))
def test_nobody_waits_for_ever_whatever_the_others_send(
    load: list[tuple[str, int, int, int, bool]], max_seqs: int, num_blocks: int, tenant: str, priority: int
) -> None:
    """A load of requests that begins anew as fast as it ends, and one request beside it."""
    made = scheduler(num_blocks, budget=16, max_seqs=max_seqs)
    again = itertools.cycle(load)
    late: list[Request] = []

    def submit() -> None:
        name, num_tokens, max_tokens, rank, is_gated = next(again)
        options = {"gate": num_tokens // 2} if is_gated else {}
        request = add(made, name, num_tokens, max_tokens, priority=rank, **options)
        if is_gated:
            late.append(request)

    for _ in range(12):
        submit()
    one = add(made, tenant, 50, 12, priority=priority)
    for number in range(1500):
        finished = run(made)
        if one in finished:
            return
        # Pictures come late, but they come.
        for _ in range(max(len(late) - 3, int(bool(late) and number % 16 == 0))):
            arrive(late.pop(0))
        if len(made.waiting) + len(made.running) < 14:
            submit()
            submit()
    raise AssertionError(f"{one.request_id} waits for ever")
