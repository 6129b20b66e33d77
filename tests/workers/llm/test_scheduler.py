"""The scheduler and the cache manager, pure; a property test runs random arrivals, aborts and late
embeddings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.wire.generation import MmChunk, MmItem, Span
from pipeline.wire.handles import TensorHandle
from pipeline.wire.sampling import FinishReason, SamplingParams
from workers.llm.cache.manager import CacheManager
from workers.llm.chunk import Chunk, ChunkRun, chunks_of
from workers.llm.request import Request
from workers.llm.scheduler import Admitted, Scheduled, Scheduler
from workers.llm.speculation.drafter import Drafter
from workers.llm.step_times import Measured, StepTimes

EOS = 7
ARRIVALS = itertools.count(1)


def make(
    name: str, num_tokens: int, max_tokens: int = 4, gate: int | None = None, ignore_eos: bool = False,
    priority: int = 0, token: int | None = None,
    tenant: str = "",
) -> Request:  # fmt: skip
    """A request whose prompt is like no other's, or is all `token`; with `gate` its last tokens from there on
    wait for an embedding."""
    positions = np.tile(np.arange(num_tokens, dtype=np.int32), (3, 1))
    chunks: list[Chunk] = []
    if gate is not None:
        chunks.append(Chunk(0, 0, (ChunkRun(gate, num_tokens, 0),), MmChunk(b"h", num_tokens - gate, 0, 1)))
    sampling = SamplingParams(ignore_eos=ignore_eos)
    arrival = next(ARRIVALS)
    prompt = [1000 + arrival if token is None else token] * num_tokens
    request = Request(b"c", name, 1, arrival, prompt, positions, 0, chunks, (), sampling, max_tokens)
    request.priority, request.tenant = priority, tenant
    return request


def scheduler(
    num_blocks: int = 100, budget: int = 16, max_seqs: int = 8, alone: frozenset[str] = frozenset()
) -> Scheduler:
    cache = CacheManager.of_size(num_blocks, 4, max_seqs)
    return Scheduler(cache, budget, (EOS,), runs_alone=alone.__contains__)


def step(made: Scheduler, token: int = 1) -> list[tuple[str, int]]:
    scheduled, *_ = made.schedule()
    made.update(scheduled, {item.request.key: [token] for item in scheduled if item.is_sampled})
    return [(item.request.request_id, item.num_tokens) for item in scheduled]


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    made = scheduler(budget=16)
    made.add(make("a", 40, max_tokens=2))
    assert [step(made) for _ in range(5)] == [[("a", 16)], [("a", 16)], [("a", 8)], [("a", 1)], []]


def test_decodes_come_first_and_prefill_takes_what_is_left() -> None:
    made = scheduler(budget=10)
    made.add(make("a", 5))
    step(made)
    made.add(make("b", 30))
    assert step(made) == [("a", 1), ("b", 9)]


def test_prefill_stops_at_a_missing_embedding_and_others_go_on() -> None:
    made = scheduler(budget=16)
    gated = make("a", 12, gate=5)
    made.add(gated)
    made.add(make("b", 6))
    assert step(made) == [("a", 5), ("b", 6)]
    assert step(made) == [("b", 1)]
    gated.chunks[0].embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (7, 8), "float32")
    assert step(made) == [("b", 1), ("a", 7)]


def test_a_short_text_before_a_missing_embedding_gets_no_step_of_its_own() -> None:
    made = scheduler(budget=128)
    gated = make("a", 70, gate=63)
    made.add(gated)
    assert step(made) == []
    made.add(make("b", 70, gate=64))
    assert step(made) == [("a", 63), ("b", 64)], "beside others it may go along"
    gated.chunks[0].embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (7, 8), "float32")
    assert step(made) == [("a", 7)]


def test_a_short_text_of_a_request_that_runs_alone_waits_too() -> None:
    made = scheduler(budget=64, alone=frozenset({"a"}))
    gated = make("a", 12, gate=5)
    made.add(gated)
    made.add(make("b", 6))
    assert step(made) == [("b", 6)]
    arrive(gated)
    assert step(made) == [("a", 12)]


def test_admission_reserves_the_prompt_and_a_spare_block_for_each_that_runs() -> None:
    made = scheduler(num_blocks=10)  # 40 tokens
    made.add(make("a", 20, max_tokens=8))
    made.add(make("b", 20, max_tokens=8))
    made.add(make("c", 1, max_tokens=1))
    made.schedule()
    assert [request.request_id for request in made.running] == ["a"]
    assert [request.request_id for request in made.waiting] == ["b", "c"], "nobody overtakes"


def test_priorities_go_first_and_equals_in_order() -> None:
    made = scheduler(max_seqs=1, budget=64)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -5)):
        made.add(make(name, 3, max_tokens=1, priority=priority))
    assert [step(made)[0][0] for _ in range(4)] == ["d", "b", "a", "c"]


def test_who_waits_for_a_picture_overtakes_nobody() -> None:
    """The place for its embedding may be held by one that it would overtake."""
    made = scheduler(max_seqs=1, budget=64)
    made.add(make("old", 3, max_tokens=1))
    urgent = make("urgent", 8, max_tokens=1, gate=4, priority=-1)
    made.add(urgent)
    assert step(made) == [("old", 3)]
    made.add(make("next", 3, max_tokens=1))
    assert step(made) == []
    assert made.running == [urgent], "now it is the oldest"
    made.remove(urgent)
    made.add(make("last", 3, max_tokens=1))
    complete = make("complete", 8, max_tokens=1, gate=4, priority=-1)
    arrive(complete)
    made.add(complete)
    assert step(made) == [("complete", 8)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    made = scheduler(num_blocks=8, budget=64)  # 32 tokens
    old, young = make("old", 12, max_tokens=12), make("young", 11, max_tokens=12)
    made.add(old)
    made.add(young)
    ended: list[str] = []
    for _ in range(40):
        scheduled, *_ = made.schedule()
        made.check_integrity()
        ended += [
            request.request_id
            for request in made.update(
                scheduled, {item.request.key: [1] for item in scheduled if item.is_sampled}
            )
        ]
    assert ended == ["old", "young"]
    assert made.num_preemptions == 1
    assert len(old.output_token_ids) == len(young.output_token_ids) == 12
    assert made.cache.blocks.num_free == 8


def test_what_the_prefix_cache_covers_is_not_waited_for() -> None:
    """Neither does it keep from overtaking: the picture lies in the first blocks."""
    made = scheduler(num_blocks=20, budget=64)
    first = make("first", 24, max_tokens=1, token=5)
    made.add(first)
    step(made)
    made.add(make("holder", 44, max_tokens=4))
    step(made)
    made.add(make("large", 60, max_tokens=4, priority=5))
    covered = make("covered", 24, max_tokens=1, priority=0, token=5)
    covered.chunks = [Chunk(0, 0, (ChunkRun(2, 10, 0),), MmChunk(b"h", 8, 0, 1))]
    made.add(covered)
    assert ("covered", 4) in step(made)


def test_a_high_priority_is_not_preempted_for_a_low_one() -> None:
    made = scheduler(num_blocks=8, budget=64)
    low, high = make("low", 12, max_tokens=12, priority=5), make("high", 11, max_tokens=12, priority=0)
    made.add(low)
    made.add(high)
    ended: list[str] = []
    for _ in range(40):
        scheduled, *_ = made.schedule()
        ended += [
            request.request_id
            for request in made.update(
                scheduled, {item.request.key: [1] for item in scheduled if item.is_sampled}
            )
        ]
    assert ended == ["high", "low"]


def test_a_known_prefix_is_not_computed_again() -> None:
    made = scheduler(budget=64)
    made.add(make("a", 10, max_tokens=3, token=5))
    assert [step(made) for _ in range(3)] == [[("a", 10)], [("a", 1)], [("a", 1)]]
    made.add(make("b", 10, max_tokens=1, token=5))
    assert step(made) == [("b", 2)], "two full blocks are there"
    made.add(make("c", 8, max_tokens=1, token=5))
    assert step(made) == [("c", 4)], "the last token is always computed"


def test_generated_tokens_are_found_in_the_next_turn() -> None:
    made = scheduler(budget=64)
    first = make("a", 6, max_tokens=7, token=5)
    made.add(first)
    while first.finish_reason is None:
        step(made, token=9)
    second = make("b", 0, max_tokens=1)
    second.prompt_token_ids = [5] * 6 + [9] * 7 + [3] * 4
    made.add(second)
    assert step(made) == [("b", 17 - 12)], (
        "12 of the 13 tokens are in full blocks, and the last of them was never computed"
    )


def test_without_a_prefix_cache_everything_is_computed() -> None:
    made = Scheduler(CacheManager.of_size(100, 4, 8), 64, (EOS,), has_prefix_cache=False)
    for name in "ab":
        made.add(make(name, 10, max_tokens=1, token=5))
        assert step(made) == [(name, 10)]
    assert made.cache.blocks.num_cached == 0


def test_equal_prompts_at_once_are_computed_once() -> None:
    made = scheduler(budget=8)
    for name in "abc":
        made.add(make(name, 17, max_tokens=1, token=5))
    made.add(make("other", 3, max_tokens=1))
    assert step(made) == [("a", 8)]
    assert step(made) == [("a", 8)]
    assert step(made) == [("a", 1), ("b", 1), ("c", 1), ("other", 3)]


def test_one_that_waits_for_anothers_prefix_goes_on_when_that_ends() -> None:
    made = scheduler(budget=8)
    first = make("a", 17, max_tokens=1, token=5)
    made.add(first)
    made.add(make("b", 17, max_tokens=1, token=5))
    assert step(made) == [("a", 8)]
    made.remove(first)
    assert step(made) == [("b", 8)], "what was computed is used, the rest it computes itself"
    made.check_integrity()


def test_tenants_with_different_salts_share_nothing() -> None:
    made = scheduler(budget=64)
    made.add(make("a", 10, max_tokens=1, token=5))
    step(made)
    other = make("b", 10, max_tokens=1, token=5)
    other.cache_salt = b"other"
    made.add(other)
    assert step(made) == [("b", 10)]


def test_an_equal_text_with_another_picture_shares_only_what_is_before_it() -> None:
    def with_picture(name: str, mm_hash: bytes) -> Request:
        request = make(name, 16, max_tokens=1, token=5)
        request.items = (MmItem((Span(6, 4),), mm_hash, mm_hash, ()),)
        return request

    made = scheduler(budget=64)
    for name, mm_hash, computed in (("a", b"x", 16), ("b", b"y", 12), ("c", b"x", 4), ("d", b"y", 4)):
        made.add(with_picture(name, mm_hash))
        assert step(made) == [(name, computed)]


def two_runs(name: str, kv_hash: bytes = b"h") -> Request:
    """20 tokens: an item with runs of 4 and 6 placeholders in chunks of 7 and 3, text around and between."""
    request = make(name, 20, max_tokens=1, token=5)
    spans = (Span(3, 4), Span(9, 6))
    item = MmItem(spans, b"h", kv_hash, (MmChunk(b"a", 7, 0, 1), MmChunk(b"b", 3, 0, 1)))
    request.items, request.chunks = (item,), chunks_of(0, item)
    return request


def test_prefill_stops_at_the_first_run_whose_embedding_is_not_there() -> None:
    made = scheduler(budget=64)
    request = two_runs("a")
    made.add(request)
    assert step(made) == []
    request.chunks[0].embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (7, 8), "float32")
    assert step(made) == [("a", 12)], "the text between, and what the first chunk fills of the second run"
    assert step(made) == []
    request.chunks[1].embeddings = TensorHandle("vit.0", 1, 0, 2, 0, (3, 8), "float32")
    assert step(made) == [("a", 8)]


def test_an_item_at_other_positions_shares_only_what_is_before_it() -> None:
    """The same pixels, so one key of the tower; another key of the cache."""
    made = scheduler(budget=64)
    for name, kv_hash, computed in (("a", b"1 fps", 20), ("b", b"2 fps", 20), ("c", b"1 fps", 4)):
        request = two_runs(name, kv_hash)
        for chunk in request.chunks:
            chunk.embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (chunk.wire.num_tokens, 8), "float32")
        made.add(request)
        assert step(made) == [(name, computed)]


def test_decodes_are_protected_from_long_prompts() -> None:
    times = StepTimes(
        [Measured(1, 0.010), Measured(8, 0.010), Measured(16, 0.014), Measured(32, 0.028)],
        per_pair=0.0,
        max_stretch=1.25,
    )
    made = Scheduler(CacheManager.of_size(100, 4, 8), 64, (EOS,), times)
    made.add(make("a", 5, max_tokens=50))
    assert step(made) == [("a", 5)], "nobody to protect"
    made.add(make("b", 60))
    assert step(made) == [("a", 1), ("b", 12)], "13 tokens take 12.5 ms"


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    made = scheduler(num_blocks=30, budget=16)
    ended: list[str] = []
    # so many short ones that, if they overtook, there would never be room for the long one
    for number in range(200):
        made.add(make(f"short-{number}", 4, max_tokens=12))
        if number == 10:
            made.add(make("long", 100, max_tokens=10))
        scheduled, *_ = made.schedule()
        ended += [
            r.request_id
            for r in made.update(scheduled, {s.request.key: [1] for s in scheduled if s.is_sampled})
        ]
        if "long" in ended:
            break
    assert "long" in ended


def test_max_num_seqs() -> None:
    made = scheduler(max_seqs=2)
    for name in "abc":
        made.add(make(name, 3))
    assert [name for name, _ in step(made)] == ["a", "b"]


@pytest.mark.parametrize(
    ("ignore_eos", "reason", "count"), [(False, FinishReason.STOP, 1), (True, FinishReason.LENGTH, 3)]
)
def test_end_of_sequence(ignore_eos: bool, reason: FinishReason, count: int) -> None:
    made = scheduler()
    request = make("a", 3, max_tokens=3, ignore_eos=ignore_eos)
    made.add(request)
    while request.finish_reason is None:
        step(made, token=EOS)
    assert request.finish_reason is reason
    assert len(request.output_token_ids) == count
    assert made.cache.blocks.num_free == made.cache.blocks.num_blocks


ACTIONS = st.one_of(
    st.tuples(
        st.just("add"),
        st.integers(1, 60),
        st.integers(1, 30),
        st.booleans(),
        st.integers(0, 2),
        st.sampled_from((None, 5, 6)),
        st.sampled_from(("", "", "b", "c")),
    ),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("embedding"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(0, 9)),
)
TIMES = StepTimes([Measured(1, 1.0), Measured(64, 2.0)], per_pair=1e-4, max_stretch=1.25)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(ACTIONS, max_size=80),
    st.integers(24, 40),
    st.integers(1, 24),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0, 1, 5]),
    st.sampled_from([1, 6, 8]),
    st.booleans(),
)
def test_invariants_hold_whatever_happens(
    actions: list[tuple[object, ...]],
    num_blocks: int,
    budget: int,
    max_seqs: int,
    has_overlap: bool,
    is_protected: bool,
    num_snapshots: int | None,
    window: int,
    has_guesses: bool,
) -> None:
    """Arrivals, aborts, late embeddings, preemptions, shared prefixes, steps that overlap, guesses: no block
    is lost or held twice, the budget holds, every request ends once with as many tokens as it asked for,
    blocks that two requests share hold equal tokens, and a state is that of its tokens.

    num_snapshots: None: no layer keeps a state.
    """
    has_guesses = has_guesses and not has_overlap
    cache = CacheManager.of_size(num_blocks, 4, max_seqs, num_snapshots is not None, num_snapshots or 0)
    drafter = Drafter(SomeOnes, 6, max_rows=8) if has_guesses else None
    times = TIMES if is_protected else None
    made = Scheduler(
        cache, max(budget, max_seqs), (EOS,), times, drafter=drafter, turn_start_id=5,
        prefill_multiple=1 if num_snapshots is None else window,
    )  # fmt: skip
    everyone: list[Request] = []
    ended: list[str] = []
    under_way: list[list[Scheduled]] = []
    contents: dict[int, list[int]] = {}  # of blocks: what is written there
    states: dict[int, list[int]] = {}  # of slots: the tokens that the state has seen
    snapshots: dict[int, list[int]] = {}  # of places: the same

    def write(item: Scheduled) -> None:
        """Stands for the runner: tokens go to their blocks, and what is read there must be what belongs
        there."""
        request = item.request
        tokens = [*request.prompt_token_ids, *request.output_token_ids, *([1] * request.num_pending_tokens)]
        tokens[item.stop :] = item.drafts
        for position in range(item.start, item.stop + len(item.drafts)):
            contents.setdefault(request.block_table[position // 4], [-1] * 4)[position % 4] = tokens[position]
        for position in range(item.stop):
            assert contents[request.block_table[position // 4]][position % 4] == tokens[position], (
                "a foreign prefix"
            )
        if num_snapshots is not None:
            state = states[request.slot]
            assert len(state) == item.start, "the state is of another place"
            state += tokens[item.start : item.stop]
            assert state == tokens[: item.stop], "a foreign state"

    def restore(admitted: Sequence[Admitted]) -> None:
        for request, num_cached_tokens, place in admitted:
            states[request.slot] = list(snapshots[place]) if place >= 0 else []
            if num_snapshots is not None:
                assert len(states[request.slot]) == num_cached_tokens

    def run() -> int:
        scheduled, admitted, *_ = made.schedule()
        restore(admitted)
        assert sum(item.num_tokens for item in scheduled) <= made.budget.max_num_batched_tokens
        assert len(made.running) <= max_seqs
        for item in scheduled:
            assert item.stop + len(item.drafts) <= len(item.request.block_table) * 4
            write(item)
        for item in scheduled:
            for save in item.saves:
                assert item.start < save.position <= item.stop + len(item.drafts)
                snapshots[save.place] = [*states[item.request.slot], *item.drafts][: save.position]
        if scheduled:
            under_way.append(scheduled)
        num_done = 0
        while len(under_way) > (1 if has_overlap and scheduled else 0):
            done = under_way.pop(0)
            tokens = {item.request.key: yielded(item) for item in done if item.is_sampled}
            for item in done:
                if item.drafts and num_snapshots is not None:
                    states[item.request.slot] += item.drafts[: len(tokens[item.request.key]) - 1]
            finished = made.update(done, tokens)
            for request in finished:
                assert len(request.output_token_ids) == request.max_tokens
            ended.extend(request.request_id for request in finished)
            num_done += 1
        made.check_integrity()
        return num_done + len(scheduled)

    for action, *values in actions:
        match action:
            case "add":
                length, max_tokens, is_gated, priority, token, tenant = values
                gate = length // 2 if is_gated else None
                name = f"r{len(everyone)}"
                everyone.append(make(name, length, max_tokens, gate, True, priority, token, tenant))
                made.add(everyone[-1])
            case "abort" if values[0] < len(everyone) and everyone[values[0]].request_id not in ended:
                made.remove(everyone[values[0]])
                ended.append(everyone[values[0]].request_id)
            case "embedding" if values[0] < len(everyone):
                arrive(everyone[values[0]])
            case "step":
                run()
    for _ in range(5000):  # late embeddings do come: everything ends, once
        for request in everyone:
            arrive(request)
        if not run():
            break
    assert sorted(ended) == sorted(request.request_id for request in everyone)
    assert made.cache.blocks.num_free == num_blocks


class SomeOnes:
    """Guesses some ones, which every text has, and then a two."""

    def __init__(self) -> None:
        self._num_taken = 0

    def extend(self, token_ids: Sequence[int]) -> None:
        self._num_taken += len(token_ids)

    def propose(self, num_tokens: int) -> list[int]:
        return [*[1] * (self._num_taken * 7 % 5), 2, 1, 1][:num_tokens]


def yielded(item: Scheduled) -> list[int]:
    """The output tokens of a step: nothing but ones."""
    drafts = [*item.drafts, 2]
    return [1] * (1 + drafts.index(2))


def arrive(request: Request) -> None:
    for chunk in request.chunks:
        chunk.embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (chunk.wire.num_tokens, 8), "float32")


def test_a_suspect_is_alone_in_its_steps_until_it_has_yielded_a_token() -> None:
    made = scheduler(budget=16, alone=frozenset("s"))
    made.add(make("a", 3, max_tokens=9))
    step(made)
    made.add(make("s", 20, max_tokens=2))
    made.add(make("b", 3))
    schedules = [made.schedule() for _ in range(1)]
    assert ([item.request.request_id for item in schedules[0].scheduled], schedules[0].is_alone) == (
        ["s"],
        True,
    )
    made.update(schedules[0].scheduled, {})
    assert step(made) == [("s", 4)]
    assert step(made) == [("a", 1), ("s", 1), ("b", 3)]
    assert not made.schedule().is_alone


def test_a_suspect_that_is_told_of_late_is_alone_from_then_on() -> None:
    """It may come before the launcher's word of it, which a worker that lives reads from another socket."""
    alone: set[str] = set()
    made = Scheduler(CacheManager.of_size(100, 4, 8), 16, (EOS,), runs_alone=lambda name: name in alone)
    made.add(make("a", 3, max_tokens=9))
    made.add(make("s", 40, max_tokens=2))
    assert step(made) == [("a", 3), ("s", 13)]
    alone.add("s")
    assert [step(made) for _ in range(2)] == [[("s", 16)], [("s", 11)]]
    assert step(made) == [("a", 1), ("s", 1)]


def test_a_suspect_that_waits_for_a_picture_holds_nobody_up() -> None:
    made = scheduler(alone=frozenset("s"))
    suspect = make("s", 12, gate=0)
    made.add(suspect)
    made.add(make("b", 6))
    assert step(made) == [("b", 6)]
    suspect.chunks[0].embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (12, 8), "float32")
    assert step(made) == [("s", 12)]


def test_a_stream_beside_many_of_another_tenant_is_hardly_held_up() -> None:
    """Each token of a step takes as long as the step itself, as on a CPU.

    Before, it took eight steps of all: 280 s.
    """
    made = scheduler(num_blocks=1000, budget=64, max_seqs=40)
    made.budget.step_times = times = StepTimes([Measured(1, 2.0), Measured(64, 65.0)], 0.0, 2.0)
    for number in range(34):
        made.add(make(f"many {number}", 4, max_tokens=500, tenant="greedy"))
    for _ in range(20):
        step(made)
    made.add(make("one", 4, max_tokens=8, tenant="other"))
    seconds, done = 0.0, []
    while "one" in [request.request_id for request in (*made.waiting, *made.running)]:
        done.append(step(made))
        seconds += times.predict(sum(count for _, count in done[-1]))
    alone = times.predict(4) + 7 * times.predict(1)
    assert seconds < 4 * alone
    assert any(len(names) > 30 for names in done), "and the others go on"
    made.check_integrity()


def test_requests_with_pictures_are_counted_until_their_first_token() -> None:
    made = scheduler()
    text, picture = make("text", 4), make("picture", 4)
    picture.items = (MmItem((Span(1, 2),), b"h", b"h", (MmChunk(b"h", 2, 0, 1),)),)
    for request in (text, picture):
        made.add(request)
        assert made.num_pictures_unanswered == (request is picture)
    step(made)
    assert made.num_pictures_unanswered == 0
