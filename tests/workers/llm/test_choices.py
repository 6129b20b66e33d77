"""Several choices behind one prompt, in rank 0's core with a real model."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from pipeline.wire.base import ChunkKey
from pipeline.wire.clients import AbortRequest, Accepted, ChoiceProgress, Interrupted, RequestFailed
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import LeaseReleased, LeaseRequest, RequestEnded
from pipeline.wire.errors import ErrorInfo
from pipeline.wire.generation import EmbeddingReady, RequestNotYours, RequestRefused
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import FinishReason, SamplingParams
from tests.chats import CHATS
from tests.fakes import PREPROCESS, VIT_0
from tests.workers.llm.test_engine import CLIENT, Rig, query

DRAWN = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True, seed=5)
PICTURE = "one picture"


def choices_of(rig: Rig, request_id: str = "r") -> dict[int, list[int]]:
    """Their tokens; each ends once."""
    tokens: dict[int, list[int]] = defaultdict(list)
    ends: list[int] = []
    for output in rig.outputs():
        if output.request_id == request_id:
            assert output.index not in ends
            assert output.offset == len(tokens[output.index])
            tokens[output.index] += unpack_int32(output.new_token_ids).tolist()
            ends += [output.index] if output.finish_reason is not None else []
    assert sorted(ends) == sorted(tokens)
    return dict(tokens)


def start(rig: Rig, n: int, sampling: SamplingParams = DRAWN, name: str = PICTURE, **options: object) -> None:
    request, ready = rig.request(CHATS[name], "r", sampling=msgspec.structs.replace(sampling, n=n), **options)
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        key = embedding.key._replace(attempt=request.attempt)
        rig.engine.handle(msgspec.structs.replace(embedding, key=key), rig.now)


def run(rig: Rig, most: int = 10_000) -> None:
    """Steps, and the ViT's answers to leases that are asked for again."""
    for _ in range(most):
        if not rig.engine.step(rig.now):
            return
        rig.engine.check_integrity()
        for asked in rig.vit.take(LeaseRequest):
            (_, again) = rig.request(CHATS[PICTURE], "r")
            rig.engine.handle(msgspec.structs.replace(again[0], key=asked.key), rig.now)


def alone(folder: Path, index: int, sampling: SamplingParams = DRAWN, name: str = PICTURE) -> list[int]:
    """What a request of its own with that choice's seed says."""
    rig = Rig(folder, 64)
    rig.open_pool()
    assert sampling.seed is not None
    start(rig, 1, msgspec.structs.replace(sampling, seed=sampling.seed + index), name)
    run(rig)
    return choices_of(rig)[0]


@pytest.fixture(scope="module")
def expected(random_checkpoint: Path) -> dict[int, list[int]]:
    made = {index: alone(random_checkpoint, index) for index in range(10)}
    assert len({tuple(tokens) for tokens in made.values()}) == 10
    return made


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
@pytest.mark.parametrize("n", [3, 10], ids=["all at once", "more than there are slots"])
def test_each_choice_says_what_its_seed_says(
    n: int,
    has_prefix_cache: bool,
    has_overlap: bool,
    random_checkpoint: Path,
    expected: dict[int, list[int]],
) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4, has_overlap=has_overlap)
    rig.scheduler.prefixes.has_cache = has_prefix_cache
    rig.open_pool()
    start(rig, n)
    run(rig)
    assert len(rig.publisher.take(Accepted)) == 1
    assert choices_of(rig) == {index: expected[index] for index in range(n)}
    assert len(rig.feedback.take(RequestEnded)) == 1
    assert rig.engine.requests == {}


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_the_prompt_is_computed_once_and_shared(has_prefix_cache: bool, random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 512, block_size=4)
    rig.scheduler.prefixes.has_cache = has_prefix_cache
    rig.open_pool()
    start(rig, 4)
    first = rig.scheduler.schedule()
    assert [item.request.index for item in first.scheduled] == [0], "the others start behind it"
    num_prompt = first.scheduled[0].num_tokens
    for request in first.admitted:
        rig.engine._requests.on_admitted(request)
    rig.engine.stepper.launch(first)
    rig.engine._collect_down_to(0, rig.now)
    second = rig.scheduler.schedule()
    computed = {item.request.index: item.num_tokens for item in second.scheduled}
    assert computed.keys() == {0, 1, 2, 3}
    assert max(computed.values()) <= 4, "the last block at most"
    tables = [set(request.block_table[: (num_prompt - 1) // 4]) for request in rig.scheduler.running]
    assert all(table == tables[0] for table in tables)


def test_no_choice_is_suspected_once_the_request_has_yielded_a_token(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    start(rig, 10)
    run(rig)
    assert rig.records == [{"r"}, set()], "while the prompt is computed, and never again"


def test_without_a_prefix_cache_only_choices_share(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.scheduler.prefixes.has_cache = False
    rig.open_pool()
    start(rig, 2)
    run(rig)
    choices_of(rig)
    again, ready = rig.request(CHATS[PICTURE], "other", sampling=msgspec.structs.replace(DRAWN, n=2))
    rig.engine.handle(again, rig.now)
    rig.engine.handle(ready[0], rig.now)
    run(rig)
    (first,) = [output for output in rig.outputs() if (output.index, output.offset) == (0, 0)]
    assert first.num_cached_tokens == 0


def test_choices_take_blocks_one_by_one(random_checkpoint: Path, expected: dict[int, list[int]]) -> None:
    """The cache holds the prompt and little more: they are preempted, and go on."""
    probe = Rig(random_checkpoint, 64)
    request, _ = probe.request(CHATS[PICTURE], "r")
    num_prompt = len(request.prompt_token_ids) // 4
    num_blocks = -(-(num_prompt + DRAWN.max_tokens) // 4) + 3  # type: ignore[operator]
    rig = Rig(random_checkpoint, 64, block_size=4, num_blocks=num_blocks)
    rig.open_pool()
    start(rig, 5)
    run(rig)
    assert choices_of(rig) == {index: expected[index] for index in range(5)}


def test_an_abort_ends_one_choice(random_checkpoint: Path, expected: dict[int, list[int]]) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    start(rig, 3)
    run(rig, 6)
    abort = AbortRequest(client_id=CLIENT, request_id="r", attempt=1, index=1)
    for _ in range(2):
        rig.engine.handle(abort, rig.now)
    rig.engine.check_integrity()
    assert rig.feedback.take(RequestEnded) == []
    run(rig)
    outputs = rig.outputs()
    ends = [(output.index, output.finish_reason) for output in outputs if output.finish_reason is not None]
    assert sorted(ends) == [
        (0, FinishReason.LENGTH),
        (1, FinishReason.ABORT),
        (1, FinishReason.ABORT),
        (2, FinishReason.LENGTH),
    ], "each abort is answered"
    assert len(rig.feedback.take(RequestEnded)) == 1, "with the last choice"
    rig.engine.handle(query("r", num_received=(12, 0, 10)), rig.now)
    first, second, third = rig.outputs()
    assert (first.new_token_ids, second.finish_reason) == (b"", FinishReason.ABORT)
    assert unpack_int32(third.new_token_ids).tolist() == expected[2][10:]


@pytest.mark.parametrize("num_steps", [0, 1])
def test_who_computes_the_prompt_hands_it_on_when_it_is_aborted(
    num_steps: int, random_checkpoint: Path, expected: dict[int, list[int]]
) -> None:
    rig = Rig(random_checkpoint, 24, block_size=4)
    rig.open_pool()
    start(rig, 3)
    run(rig, num_steps)
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1, index=0), rig.now)
    rig.engine.check_integrity()
    run(rig)
    said = choices_of(rig)
    assert said.pop(0) == []
    assert said == {index: expected[index] for index in (1, 2)}


def test_a_resubmission_goes_on_behind_each_choice(
    random_checkpoint: Path, expected: dict[int, list[int]]
) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    progress = (
        ChoiceProgress(pack_int32(expected[0]), is_over=True),
        ChoiceProgress(pack_int32(expected[1][:5])),
    )
    start(rig, 3, attempt=2, choices=progress)
    run(rig)
    outputs = rig.outputs()
    assert {output.index for output in outputs} == {1, 2}, "what was over is not run again"
    said = {index: [o for o in outputs if o.index == index] for index in (1, 2)}
    assert said[1][0].offset == 5
    for index, so_far in ((1, expected[1][:5]), (2, [])):
        new = [t for output in said[index] for t in unpack_int32(output.new_token_ids).tolist()]
        assert so_far + new == expected[index]


def test_a_dead_vit_interrupts_all_choices_at_once(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    request, _ = rig.request(CHATS[PICTURE], "r", sampling=msgspec.structs.replace(DRAWN, n=3))
    rig.engine.handle(request, rig.now)
    run(rig)
    rig.engine.on_death(WorkerState(VIT_0, 2, True), rig.now)
    assert [message.attempt for message in rig.publisher.take(Interrupted)] == [1]
    assert rig.engine.requests == {}
    rig.engine.check_integrity()


@pytest.mark.parametrize("n", [2, 10], ids=["all at once", "more than there are slots"])
@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_a_picture_in_the_last_block_stays_leased_until_all_choices_have_read_it(
    has_prefix_cache: bool, n: int, random_checkpoint: Path, expected: dict[int, list[int]]
) -> None:
    """The block size leaves some of the picture to each choice, and nobody keeps unleased pictures."""
    rig = Rig(random_checkpoint, 512, block_size=64)
    rig.scheduler.prefixes.has_cache = has_prefix_cache
    rig.open_pool()
    start(rig, n)
    released: list[int] = []
    while rig.engine.step(rig.now):
        rig.engine.check_integrity()
        released += [lease_id for message in rig.vit.take(LeaseReleased) for lease_id in message.lease_ids]
        choices = [one for each in rig.engine.requests.values() for one in each.open]
        held = {chunk.lease.lease_id for one in choices for chunk in one.chunks if chunk.lease}
        assert not held & set(released), "released while a choice holds it"
    assert rig.vit.take(LeaseRequest) == [], "none asks again"
    assert len(released) == len(set(released)) == 1
    assert choices_of(rig) == {index: expected[index] for index in range(n)}


def test_the_shared_lease_of_choices_that_are_aborted_is_released_once(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 512, block_size=64)
    rig.open_pool()
    start(rig, 10)
    run(rig, 2)
    assert rig.vit.take(LeaseReleased) == []
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), rig.now)
    run(rig)
    assert [len(message.lease_ids) for message in rig.vit.take(LeaseReleased)] == [1]
    assert not rig.engine._leases._num_more


def test_a_failed_request_keeps_no_tokens_for_its_client(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    start(rig, 2)
    run(rig, 6)
    rig.engine.on_death(WorkerState(PREPROCESS, 2, True), rig.now)
    refused = RequestRefused(
        sender=PREPROCESS,
        epoch=2,
        client_id=CLIENT,
        request_id="r",
        attempt=1,
        error=ErrorInfo(400, "broken"),
    )
    rig.engine.handle(refused, rig.now)
    ended = rig.engine._clients.ended("r")
    assert ended is not None
    assert ended.outputs == ()


def test_an_owner_is_not_refused_its_running_request(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    rig.greet(b"o" * 16)
    start(rig, 2)
    run(rig, 6)
    rig.publisher.published.clear()
    for client_id in (b"o" * 16, CLIENT):
        refusal = RequestNotYours(sender=PREPROCESS, epoch=1, client_id=client_id, request_id="r", attempt=1)
        rig.engine.handle(refusal, rig.now)
    assert len(rig.publisher.take(RequestFailed)) == 1, "the other one's"
    assert len(rig.publisher.take(Accepted)) == 1
    assert "r" in rig.engine.requests


def test_a_choice_whose_prompt_is_gone_from_the_cache_leases_the_picture_again(
    random_checkpoint: Path, expected: dict[int, list[int]]
) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    start(rig, 2)
    run(rig, 3)
    for request in list(rig.scheduler.running):
        rig.scheduler._preempt(request)
        rig.engine._requests.on_preempted(request)
    rig.scheduler.cache.blocks._by_hash.clear()
    rig.scheduler.cache.blocks._hashes[:] = [None] * rig.scheduler.cache.blocks.num_blocks
    asked: list[ChunkKey] = []
    while rig.engine.step(rig.now) or rig.vit.sent:
        for again in rig.vit.take(LeaseRequest):
            asked.append(again.key)
            (_, ready) = rig.request(CHATS[PICTURE], "r")
            answer: EmbeddingReady = msgspec.structs.replace(ready[0], key=again.key)
            rig.engine.handle(answer, rig.now)
        rig.vit.sent.clear()
    assert asked
    assert choices_of(rig) == {index: expected[index] for index in range(2)}
