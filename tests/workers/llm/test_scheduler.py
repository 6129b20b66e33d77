"""The scheduler and the block manager, pure; a property test runs random arrivals, aborts and late embeddings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.messages import MmChunk
from pipeline.sampling import FinishReason, SamplingParams
from pipeline.tensors import TensorHandle
from workers.llm.block_manager import BlockManager
from workers.llm.request import Chunk, Request, mrope_positions
from workers.llm.scheduler import Scheduler

EOS = 7


def make(name: str, num_tokens: int, max_tokens: int = 4, gate: int | None = None, ignore_eos: bool = False) -> Request:
    """A request; with `gate` its last tokens from there on wait for an embedding."""
    positions, delta = mrope_positions(num_tokens, [], 2)
    chunks = [] if gate is None else [Chunk(0, 0, gate, MmChunk(b"h", num_tokens - gate, 0, 1))]
    sampling = SamplingParams(ignore_eos=ignore_eos)
    return Request(b"c", name, 1, 1, [1] * num_tokens, positions, delta, chunks, (), sampling, max_tokens)


def scheduler(num_blocks: int = 100, budget: int = 16, max_seqs: int = 8) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, 4), max_seqs, budget, (EOS,))


def step(made: Scheduler, token: int = 1) -> list[tuple[str, int]]:
    scheduled = made.schedule()
    made.update(scheduled, {item.request.request_id: token for item in scheduled if item.is_sampled})
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


def test_admission_reserves_prompt_and_output_first_come_first_served() -> None:
    made = scheduler(num_blocks=10)  # 40 tokens
    made.add(make("a", 20, max_tokens=8))
    made.add(make("b", 20, max_tokens=8))
    made.add(make("c", 1, max_tokens=1))
    made.schedule()
    assert [request.request_id for request in made.running] == ["a"]
    assert [request.request_id for request in made.waiting] == ["b", "c"]


def test_a_stream_of_short_prompts_does_not_starve_a_long_one() -> None:
    made = scheduler(num_blocks=30, budget=16)
    made.add(make("first", 100, max_tokens=10))
    made.add(make("long", 100, max_tokens=10))
    ended: list[str] = []
    for number in range(200):
        made.add(make(f"short-{number}", 4, max_tokens=2))
        scheduled = made.schedule()
        ended += [r.request_id for r in made.update(scheduled, {s.request.request_id: 1 for s in scheduled if s.is_sampled})]
        if "long" in ended:
            break
    assert "long" in ended


def test_max_num_seqs() -> None:
    made = scheduler(max_seqs=2)
    for name in "abc":
        made.add(make(name, 3))
    assert [name for name, _ in step(made)] == ["a", "b"]


@pytest.mark.parametrize(("ignore_eos", "reason", "count"), [(False, FinishReason.STOP, 1), (True, FinishReason.LENGTH, 3)])
def test_end_of_sequence(ignore_eos: bool, reason: FinishReason, count: int) -> None:
    made = scheduler()
    request = make("a", 3, max_tokens=3, ignore_eos=ignore_eos)
    made.add(request)
    while request.finish_reason is None:
        step(made, token=EOS)
    assert request.finish_reason is reason
    assert len(request.output_token_ids) == count
    assert made.blocks.num_free == made.blocks.num_blocks


def test_blocks_are_never_given_twice() -> None:
    blocks = BlockManager(4, 4)
    assert sorted(blocks.allocate("a", 9)) == sorted(set(blocks.allocate("b", 3)) ^ {0, 1, 2, 3})
    assert not blocks.can_allocate(1)
    with pytest.raises(ValueError, match="cannot give"):
        blocks.allocate("c", 1)
    blocks.free("a")
    with pytest.raises(ValueError, match="cannot give"):
        blocks.allocate("b", 1)
    blocks.check_integrity()


ACTIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 60), st.integers(1, 12), st.booleans()),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("embedding"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(0, 9)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=80), st.integers(18, 40), st.integers(1, 24), st.integers(1, 5))
def test_invariants_hold_whatever_happens(actions: list[tuple[object, ...]], num_blocks: int, budget: int, max_seqs: int) -> None:
    made = scheduler(num_blocks, budget, max_seqs)
    everyone: list[Request] = []
    ended: list[str] = []

    def run(token: int) -> int:
        scheduled = made.schedule()
        assert sum(item.num_tokens for item in scheduled) <= budget
        assert len(made.running) <= max_seqs
        for request, num_tokens in scheduled:
            assert request.num_computed_tokens + num_tokens <= min(request.num_ready_tokens(), len(request.block_table) * 4)
        finished = made.update(scheduled, {item.request.request_id: token for item in scheduled if item.is_sampled})
        ended.extend(request.request_id for request in finished)
        made.blocks.check_integrity()
        return len(scheduled)

    for action, *values in actions:
        match action:
            case "add":
                length, max_tokens, is_gated = values
                everyone.append(make(f"r{len(everyone)}", length, max_tokens, length // 2 if is_gated else None))
                made.add(everyone[-1])
            case "abort" if values[0] < len(everyone) and everyone[values[0]].request_id not in ended:
                made.remove(everyone[values[0]])
                ended.append(everyone[values[0]].request_id)
            case "embedding" if values[0] < len(everyone):
                for chunk in everyone[values[0]].chunks:
                    chunk.embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (chunk.wire.num_tokens, 8), "float32")
            case "step":
                run(values[0])
    for request in everyone:  # late embeddings do come: everything ends, once
        for chunk in request.chunks:
            chunk.embeddings = TensorHandle("vit.0", 1, 0, 1, 0, (chunk.wire.num_tokens, 8), "float32")
    while run(1):
        pass
    assert sorted(ended) == sorted(request.request_id for request in everyone)
    assert made.blocks.num_free == num_blocks
