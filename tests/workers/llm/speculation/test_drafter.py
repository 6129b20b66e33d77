"""Which decodes get drafts: back-off, shares of the step, and blocks that nobody else needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tests.workers.llm.test_scheduler import make, scheduler, step
from workers.llm.cache.manager import CacheManager
from workers.llm.request import Request
from workers.llm.scheduler import Scheduler
from workers.llm.speculation.drafter import MAX_MISSES, MAX_TO_WAIT, Drafter
from workers.llm.speculation.told import ToldProposer


class Ones:
    """Guesses as many ones as it is asked for, and counts what it gets."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        self.taken += token_ids

    def propose(self, num_tokens: int) -> list[int]:
        return [1] * num_tokens


def decoding(drafter: Drafter, *max_tokens: int, num_blocks: int = 100) -> tuple[Scheduler, list[Request]]:
    """Requests that decode, with 5 tokens of prompt and one of output: their blocks have room for 2 more."""
    made = scheduler(num_blocks, budget=64)
    made.drafter = drafter
    requests = [make(f"r{number}", 5, most, ignore_eos=True) for number, most in enumerate(max_tokens)]
    for request in requests:
        made.add(request)
    step(made)
    return made, requests


def scheduled(made: Scheduler) -> dict[str, int]:
    """The number of each request's drafts in the next step, in order; all of them are wrong."""
    items = made.schedule().scheduled
    made.update(items, {item.request.key: [2] for item in items})
    return {item.request.request_id: len(item.drafts) for item in items}


def test_a_request_that_is_never_right_is_left_alone_ever_longer() -> None:
    made, _ = decoding(Drafter(Ones, 3), 200)
    tries = [number for number in range(150) if scheduled(made)["r0"]]
    pauses = [after - before - 1 for before, after in itertools.pairwise(tries)]
    assert pauses == [*[0] * MAX_MISSES, 2, 4, 8, 16, 32, 32, 32][: len(pauses)]
    assert max(pauses) == MAX_TO_WAIT
    made.update(made.schedule().scheduled, {("r0", 0): [2]})


def test_one_right_guess_ends_the_pauses() -> None:
    made, _ = decoding(Drafter(Ones, 3), 200)
    for _ in range(30):
        scheduled(made)
    while not (items := made.schedule().scheduled)[0].drafts:
        made.update(items, {("r0", 0): [2]})
    made.update(items, {("r0", 0): [1, 2]})
    assert [scheduled(made)["r0"] for _ in range(4)] == [3, 3, 3, 3]


def test_drafts_never_reach_beyond_the_last_token() -> None:
    made, (request,) = decoding(Drafter(Ones, 9), 6)
    (item,) = made.schedule().scheduled
    assert len(item.drafts) == 4, "one token is there, and the step yields one more than it has drafts"
    assert made.update([item], {request.key: [1] * 5}) == [request]
    assert request.output_token_ids == [1] * 6


def test_the_rows_of_a_step_are_shared() -> None:
    made, _ = decoding(Drafter(Ones, 8, max_rows=16), 100, 100, 4)
    assert scheduled(made) == {"r2": 2, "r0": 5, "r1": 6}
    made, _ = decoding(Drafter(Ones, 8, max_rows=4), *[100] * 3)
    assert scheduled(made) == {"r0": 0, "r1": 0, "r2": 1}, "who has none goes first"
    made, _ = decoding(Drafter(Ones, 8, max_rows=4), *[100] * 5)
    assert sum(scheduled(made).values()) == 0


def test_the_budget_of_a_step_holds() -> None:
    made, _ = decoding(Drafter(Ones, 8), 100)
    made.budget.max_num_batched_tokens = 4
    assert scheduled(made) == {"r0": 3}
    made.add(make("long", 40))
    items = made.schedule().scheduled
    assert [(item.request.request_id, item.num_tokens) for item in items] == [("r0", 1), ("long", 3)]


def test_drafts_take_only_blocks_that_nobody_needs() -> None:
    """Each request has 6 tokens in 2 blocks of 4. A spare block for each that runs must stay free."""
    for num_free, wanted in ((2, 2), (3, 6), (4, 8)):
        made, requests = decoding(Drafter(Ones, 8), 100, 2, num_blocks=4 + num_free)
        assert requests[1].max_tokens - len(requests[1].output_token_ids) == 1, "it gets no drafts"
        assert scheduled(made)["r0"] == wanted, num_free
        assert made.num_preemptions == 0


def test_what_has_ended_is_forgotten_and_what_is_preempted_is_not() -> None:
    drafter = Drafter(Ones, 3)
    made, (first, second) = decoding(drafter, 100, 100)
    scheduled(made)
    assert set(drafter._drafted) == {first.key, second.key}
    made._preempt(second)
    made.remove(first)
    assert set(drafter._drafted) == {second.key}
    while second.num_remaining_tokens > 1 or second.slot < 0:
        step(made)
    scheduled(made)
    (drafted,) = drafter._drafted.values()
    proposer = drafted.proposer
    assert isinstance(proposer, Ones)
    known = [*second.prompt_token_ids, *second.output_token_ids]
    assert proposer.taken == known[: len(proposer.taken)]
    assert len(proposer.taken) >= len(known) - 1
    made.remove(second)
    assert not drafter._drafted


def test_what_is_told_of_it() -> None:
    drafter = Drafter(Ones, 3)
    made, (request,) = decoding(drafter, 100)
    for accepted in (0, 2, 3):
        items = made.schedule().scheduled
        made.update(items, {request.key: [1] * accepted + [2]})
    assert list(drafter.counters.values()) == [3, 9, 5]
    assert list(drafter.counters) == [
        f"spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")
    ]


def test_only_accepted_tokens_are_published() -> None:
    made, (request,) = decoding(Drafter(Ones, 8), 100)
    items = made.schedule().scheduled
    assert items[0].num_tokens == 9, "tokens 5 to 13"
    made.update(items, {request.key: [1, 1, 2]})
    assert (request.num_computed_tokens, request.num_tokens) == (8, 9)
    assert request.num_published_blocks == 2
    assert made.cache.find(request.block_hashes(3, 4)) == request.block_table[:2]
    assert isinstance(made.cache, CacheManager)
    made.check_integrity()


def asking(num_tokens: int, max_rows: int = 16) -> Drafter:
    return Drafter(ToldProposer, num_tokens, max_rows, asks_runner=True)


def told(made: Scheduler, guesses: list[int], accepted: int = 0) -> dict[str, tuple[int, int]]:
    """The number of each request's drafts in the next step, and of the guesses that it is to make."""
    items = made.schedule().scheduled
    made.update(
        items,
        {item.request.key: [*item.drafts[:accepted], 2] for item in items},
        {item.request.key: guesses[: item.num_guesses] for item in items if item.num_guesses},
    )
    made.check_integrity()
    return {item.request.request_id: (len(item.drafts), item.num_guesses) for item in items}


def test_the_runner_is_asked_for_what_the_next_step_can_compute() -> None:
    made, _ = decoding(asking(3), 200)
    assert told(made, [1, 1, 1]) == {"r0": (0, 3)}
    assert told(made, [1, 1, 1], 2) == {"r0": (3, 3)}
    assert told(made, [1, 1], 2) == {"r0": (3, 3)}
    assert told(made, [1, 1, 1], 2) == {"r0": (2, 3)}, "as many as it could make"
    made, _ = decoding(asking(3, max_rows=5), 200, 200)
    assert told(made, [1, 1, 1]) == {"r0": (0, 2), "r1": (0, 2)}
    assert told(made, [1, 1, 1]) == {"r0": (1, 2), "r1": (2, 2)}
    made, _ = decoding(asking(3, max_rows=2), 200, 200)
    assert told(made, []) == {"r0": (0, 0), "r1": (0, 0)}


def test_the_runner_is_not_asked_while_a_request_is_left_alone() -> None:
    made, _ = decoding(asking(3), 200)
    seen = [told(made, [1, 1, 1])["r0"] for _ in range(40)]
    assert seen[: 2 + MAX_MISSES + 4] == [
        (0, 3), *[(3, 3)] * (MAX_MISSES + 1), (0, 0), (0, 3), (3, 3), (0, 0),
    ]  # fmt: skip
    for (num_drafts, _), (_, num_guesses) in itertools.pairwise([*reversed(seen)]):
        assert num_drafts <= num_guesses, "what is verified was asked for"


def test_nothing_is_asked_for_behind_the_last_token() -> None:
    made, _ = decoding(asking(3), 5)
    assert told(made, [1, 1, 1]) == {"r0": (0, 2)}, "the second to the last but one"
    assert told(made, [1, 1, 1]) == {"r0": (2, 1)}
    assert told(made, [1, 1, 1]) == {"r0": (1, 0)}
    assert told(made, [1, 1, 1]) == {"r0": (0, 0)}


def test_blocks_are_not_taken_behind_the_last_token_of_a_request() -> None:
    """There is no room in the runner's tables for more than the longest context has."""
    made, (request,) = decoding(asking(8), 9)
    assert told(made, [1] * 8) == {"r0": (0, 6)}
    assert told(made, [1] * 8) == {"r0": (6, 5)}, "which may be 11 tokens more, but there are only 7"
    assert len(request.block_table) == 4, "of 4 tokens each, for 14"


def test_guesses_count_only_for_the_place_for_which_they_were_made() -> None:
    proposer = ToldProposer()
    proposer.tell(4, [7, 8, 9])
    proposer.extend([1, 2, 3])
    assert proposer.propose(2) == ()
    proposer.extend([4])
    assert proposer.propose(2) == [7, 8]
    proposer.extend([7])
    assert proposer.propose(2) == ()


def test_guesses_have_blocks_for_what_they_are_made_from_where_any_are_free() -> None:
    """Two blocks of 4 for 6 tokens. The step computes the 6th: 3 guesses behind it need two more places."""
    for num_free, num_blocks in ((4, 2), (0, 2)):
        made, (request,) = decoding(asking(3), 200, num_blocks=2 + num_free)
        told(made, [1, 1, 1])
        assert len(request.block_table) == num_blocks
        told(made, [1, 1, 1])
        assert len(request.block_table) == (3 if num_free else 2)
