from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams, with_seed
from pipeline.wire.steps import SequenceStart, StepPlan
from tests.fakes import LLM_0
from tests.workers.llm.sampling.rig import make_sampler, make_setup, start
from workers.llm.sampling.base import Int64Array, LogitRows, Setup, TokensSoFar

GREEDY = SamplingParams(temperature=0, seed=1)


def test_a_slot_forgets_who_was_there_before() -> None:
    sampler, logits = make_sampler(1, 5), torch.tensor([[0.0, 1.0, 0.5, 2.0, 0.0]])
    params = SamplingParams(
        temperature=0,
        seed=1,
        frequency_penalty=2.0,
        logit_bias={4: 50.0},
        stop_token_ids=(3,),
        min_tokens=5,
        logprobs=2,
    )
    start(sampler, 0, params, output=[1, 1])
    assert sampler.sample(logits.clone(), np.array([0]), np.array([2])).token_ids.tolist() == [4]
    start(sampler, 0, SamplingParams(temperature=0, seed=1, frequency_penalty=2.0))
    sampled = sampler.sample(logits.clone(), np.array([0]), np.array([0]))
    assert (sampled.token_ids.tolist(), sampled.logprobs) == ([3], None)
    start(sampler, 0, GREEDY)
    assert sampler.is_plain(np.array([0]))


def test_only_plain_requests_are_plain() -> None:
    wishes = [{}, {"logit_bias": {1: 1.0}}, {"presence_penalty": 1.0}, {"min_tokens": 3}, {"logprobs": 0}]
    sampler = make_sampler(len(wishes), 5)
    for slot, options in enumerate(wishes):
        start(sampler, slot, SamplingParams(seed=1, top_p=0.9, **options))  # type: ignore[arg-type]
    assert [sampler.is_plain(np.array([0, slot])) for slot in range(len(wishes))] == [
        True,
        False,
        False,
        False,
        False,
    ]


class Watch:
    """Notes which rows it is given."""

    def __init__(self, setup: Setup) -> None:
        self.applied: list[list[int]] = []
        self.accepted: list[tuple[list[int], list[int]]] = []

    def start(self, slot: int, params: SamplingParams, tokens: TokensSoFar) -> bool:
        return params.min_p == 0.5

    def apply(self, logits: Tensor, rows: LogitRows) -> None:
        self.applied.append(rows.places.tolist())

    def accept(self, slots: Int64Array, token_ids: Tensor) -> None:
        self.accepted.append((slots.tolist(), token_ids.tolist()))


def test_a_row_that_asks_nothing_of_a_processor_is_not_touched_by_it() -> None:
    """Not by the server's own either: logits of other rows are NaN wherever a processor would read them."""
    watch = Watch(make_setup(4, 6))
    sampler = make_sampler(4, 6, [watch])
    asking = {"logit_bias": {1: 1.0}, "presence_penalty": 1.0, "min_tokens": 3}
    for slot, options in enumerate(({"min_p": 0.5}, {}, {"min_p": 0.5}, asking)):
        start(sampler, slot, SamplingParams(seed=1, **options))  # type: ignore[arg-type]
    logits = torch.randn(3, 6)
    before = logits.clone()
    slots = np.array([3, 2, 1])
    sampled = sampler.sample(logits, slots, np.zeros(3, dtype=np.int64))
    assert torch.equal(logits[1:], before[1:])
    assert not torch.equal(logits[0], before[0])
    assert watch.applied == [[1]]
    assert watch.accepted == [([2], [int(sampled.token_ids[1])])]
    sampler.sample(before[:1], slots[2:], np.zeros(1, dtype=np.int64))
    assert len(watch.applied) == 1, "in a step without one that asks, a processor is not called"


def test_every_rank_chooses_the_same() -> None:
    """Ranks have the same logits, and from the plan the same requests; one is resumed, and its draws go
    on."""
    params = [
        with_seed(SamplingParams(), "a", 0),
        with_seed(SamplingParams(top_p=0.9, presence_penalty=1.5, min_tokens=4), "b", 0),
        with_seed(SamplingParams(top_k=30, logit_bias={5: 3.0}), "c", 0),
    ]
    starts = tuple(SequenceStart(slot, 2, one, pack_int32([1, 2, 3, 4])) for slot, one in enumerate(params))
    plan = StepPlan(sender=LLM_0, epoch=1, step=1, started=starts, sequences=())
    other = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
    ranks = []
    for received in (plan, other):
        sampler = make_sampler(3, 400)
        for one in received.started:
            sampler.start(one)
        ranks.append(sampler)
    torch.manual_seed(0)
    for step in range(50):
        logits = torch.randn(3, 400)
        slots, num_tokens = np.array([2, 0, 1]), np.array([4, 4, 4]) + step
        first, second = (rank.sample(logits.clone(), slots, num_tokens).token_ids.tolist() for rank in ranks)
        assert first == second


def test_a_request_that_is_resumed_draws_on() -> None:
    """The number of a draw counts output tokens over all attempts; so does what penalties count."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(30, 100)
    params = SamplingParams(seed=3, top_p=0.95, frequency_penalty=0.5)

    def run(output: list[int]) -> list[int]:
        sampler, made = make_sampler(2, 100), list(output)
        start(sampler, 1, params, prompt=[7, 8], output=output)
        while len(made) < len(logits):
            row = logits[len(made)][None].clone()
            made += sampler.sample(row, np.array([1]), np.array([2 + len(made)])).token_ids.tolist()
        return made

    whole = run([])
    assert [run(whole[:count]) for count in (1, 11, 29)] == [whole] * 3


def test_a_masked_row_waits_and_gets_only_what_its_mask_allows() -> None:
    """Two ranks: masks come packed, and mean the same on both; other rows go by their logits as they are."""
    torch.manual_seed(0)
    vocab_size, params = 21, SamplingParams(seed=1, logprobs=1, logit_bias={3: 100.0})
    allowed = np.zeros((3, vocab_size), dtype=np.bool_)
    allowed[0, [7, 20]] = allowed[1, [0, 8, 16]] = True
    allowed[2] = True
    masks = [np.packbits(row, bitorder="little").tobytes() for row in allowed[:2]]
    sampler = make_sampler(4, vocab_size)
    for slot in range(3):
        sampler.start(SequenceStart(slot, 0, params, b"", is_masked=slot < 2))
    slots = np.arange(3)
    assert sampler.waits_for_masks(slots).tolist() == [True, True, False]
    for number in range(50):
        logits = torch.randn(3, vocab_size)
        numbers = np.full(3, number)
        sampled = sampler.sample(logits.clone(), slots, numbers, [*masks, b""])
        assert allowed[slots, sampled.token_ids.numpy()].all()
        assert int(sampled.token_ids[2]) == 3, "an empty mask forbids nothing"
        assert sampled.logprobs is not None
        own = logits.log_softmax(-1)[torch.arange(3), sampled.token_ids]
        assert torch.allclose(sampled.logprobs[:, 0], own), "as the model gave them"
        alone = sampler.sample(logits[1:2].clone(), slots[1:2], numbers[1:2], masks[1:])
        assert alone.token_ids.tolist() == [int(sampled.token_ids[1])]
