"""Rank 0's core with a real model and real pools: fidelity when embeddings come late, and how requests
end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from pipeline.process.flight_recorder import digest_of
from pipeline.transport.ends import Subscription
from pipeline.wire.base import ChunkKey
from pipeline.wire.clients import (
    PROTOCOL_VERSION,
    AbortRequest,
    Accepted,
    ChoiceProgress,
    Hello,
    Interrupted,
    Preparing,
    QueryRequest,
    RequestFailed,
    Welcome,
)
from pipeline.wire.control import WorkerState
from pipeline.wire.encoding import ItemNotNeeded, LeaseReleased, LeaseRequest, LeaseSet, RequestEnded
from pipeline.wire.errors import ErrorInfo, PipelineError
from pipeline.wire.generation import (
    EmbeddingReady,
    EncodeFailed,
    LeaseRefused,
    RequestNotYours,
    RequestRefused,
)
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import FinishReason, SamplingParams
from pipeline.wire.steps import StepPlan
from pipeline.wire.topology import Role, WorkerId
from tests.chats import CHATS
from tests.engine_rig import CLIENT, NUM_TOKENS, Rig
from tests.fakes import LLM_0, PREPROCESS, VIT_0
from tests.reference import Answer, Reference, assert_same_tokens


def behind(token_ids: list[int]) -> tuple[ChoiceProgress, ...]:
    return (ChoiceProgress(pack_int32(token_ids)),)


def query(request_id: str, attempt: int = 1, num_received: tuple[int, ...] = ()) -> QueryRequest:
    return QueryRequest(client_id=CLIENT, request_id=request_id, attempt=attempt, num_received=num_received)


@pytest.fixture(scope="module")
def references(random_checkpoint: Path) -> dict[str, Answer]:
    reference = Reference(random_checkpoint)
    return {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}


def test_the_reference_text_is_lively(references: dict[str, Answer]) -> None:
    """Else equal tokens would prove nothing."""
    assert len({tuple(answer.token_ids) for answer in references.values()}) == len(references)
    assert all(len(set(answer.token_ids)) >= NUM_TOKENS // 3 for answer in references.values())


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize(("budget", "block_size"), [(512, 16), (7, 4)])
@pytest.mark.parametrize("name", CHATS)
def test_late_and_unordered_embeddings_give_the_same_tokens(
    name: str,
    budget: int,
    block_size: int,
    has_overlap: bool,
    random_checkpoint: Path,
    references: dict[str, Answer],
) -> None:
    rig = Rig(random_checkpoint, budget, block_size, has_overlap=has_overlap)
    rig.open_pool()
    rig.scheduler.prefixes.has_cache = False
    for number, order in enumerate(("in order", "reversed")):
        request, ready = rig.request(CHATS[name], f"r{number}")
        rig.engine.handle(request, rig.now)
        for embedding in ready if order == "in order" else reversed(ready):
            rig.run()  # prefills as far as it can before each arrival
            rig.engine.handle(embedding, rig.now)
        rig.run()
        assert_same_tokens(rig.tokens(f"r{number}"), references[name], f"{name}, {order}")
        released = [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids]
        assert sorted(released) == sorted(embedding.lease_id for embedding in ready)


@pytest.mark.interpreter
def test_the_way_of_a_gpu_gives_the_same_tokens(
    random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    """Triton's kernels, padded decode batches and all, in the interpreter; one request draws, one has a bias
    and wants logprobs."""
    count = 4
    rig = Rig(random_checkpoint, 512, has_overlap=True, attention="triton")
    rig.open_pool()
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, seed=1)
    favourite = 77
    wishes = {
        "text only": greedy,
        "one picture": greedy,
        "drawn": msgspec.structs.replace(greedy, temperature=1.0, top_p=0.9),
        "biased": msgspec.structs.replace(greedy, logit_bias={favourite: 100.0}, logprobs=2),
    }
    for name, sampling in wishes.items():
        request, ready = rig.request(CHATS.get(name, CHATS["text only"]), name, sampling=sampling)
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
    rig.run()
    outputs = rig.outputs()
    tokens = {
        name: [
            t for out in outputs if out.request_id == name for t in unpack_int32(out.new_token_ids).tolist()
        ]
        for name in wishes
    }
    for name in ("text only", "one picture"):
        answer = references[name]
        assert_same_tokens(tokens[name], answer._replace(token_ids=answer.token_ids[:count]), name)
    assert len(set(tokens["drawn"])) > 2
    assert tokens["drawn"] != tokens["text only"]
    assert tokens["biased"] == [favourite] * count
    logprobs = [entry for out in outputs if out.request_id == "biased" for entry in out.logprobs]
    assert [unpack_int32(entry.token_ids)[0] for entry in logprobs] == [favourite] * count


def test_embeddings_before_the_pool_and_before_the_request(
    random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    name = "three pictures between texts"
    rig = Rig(random_checkpoint, 64)
    request, ready = rig.request(CHATS[name], "r")
    for embedding in ready[:2]:
        rig.engine.handle(embedding, rig.now)
    rig.open_pool()
    rig.engine.handle(ready[2], rig.now)
    rig.engine.handle(request, rig.now)
    rig.run()
    assert_same_tokens(rig.tokens("r"), references[name])


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_all_chats_in_one_batch(
    has_overlap: bool, random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    rig = Rig(random_checkpoint, 40, has_overlap=has_overlap)
    rig.open_pool()
    late: list[EmbeddingReady] = []
    for name, chat in CHATS.items():
        request, ready = rig.request(chat, name)
        rig.engine.handle(request, rig.now)
        late += ready
        rig.engine.step(rig.now)
    for embedding in reversed(late):
        rig.engine.step(rig.now)
        rig.engine.handle(embedding, rig.now)
    rig.run()
    outputs = rig.outputs()
    for name in CHATS:
        tokens = [
            t
            for output in outputs
            if output.request_id == name
            for t in unpack_int32(output.new_token_ids).tolist()
        ]
        assert_same_tokens(tokens, references[name], name)


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("name", CHATS)
def test_a_warm_prefix_cache_gives_the_same_tokens_and_needs_no_picture(
    name: str, has_overlap: bool, random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    rig = Rig(random_checkpoint, 64, block_size=4, has_overlap=has_overlap)
    rig.open_pool()
    for turn in ("cold", "warm"):
        request, ready = rig.request(CHATS[name], turn)
        rig.engine.handle(request, rig.now)
        if turn == "cold":
            for embedding in ready:
                rig.engine.handle(embedding, rig.now)
        rig.run()
        outputs = [output for output in rig.outputs() if output.request_id == turn]
        assert_same_tokens(
            [t for output in outputs for t in unpack_int32(output.new_token_ids).tolist()],
            references[name],
            f"{name}, {turn}",
        )
        not_needed = [message.item for message in rig.feedback.take(ItemNotNeeded)]
        if turn == "warm":
            assert not_needed == list(range(len(ready)))
            assert outputs[0].num_cached_tokens == (len(references[name].prompt_token_ids) - 1) // 4 * 4
            for embedding in ready:  # they were under way already: given back at once
                rig.engine.handle(embedding, rig.now)
            assert (
                sorted(lease for m in rig.vit.take(LeaseReleased) for lease in m.lease_ids)[-len(ready) :]
                == [e.lease_id for e in ready]
                or not ready
            )


def test_another_picture_of_equal_size_never_hits(random_checkpoint: Path) -> None:
    """A, A, B, A: the same text, and A's answer each time that A is shown."""
    chats = {
        name: [("user", [Image.new("RGB", (112, 112), color), "What do you see? " * 4])]
        for name, color in (("A", "red"), ("B", "blue"))
    }
    reference = Reference(random_checkpoint)
    expected = {name: reference.answer(chat, NUM_TOKENS) for name, chat in chats.items()}
    assert expected["A"].token_ids != expected["B"].token_ids
    assert expected["A"].prompt_token_ids == expected["B"].prompt_token_ids
    rig = Rig(random_checkpoint, 64, block_size=4)
    rig.open_pool()
    cached = []
    for number, name in enumerate("AABA"):
        request, ready = rig.request(chats[name], f"r{number}")
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            rig.engine.handle(embedding, rig.now)
        rig.run()
        outputs = rig.outputs()
        cached.append(outputs[0].num_cached_tokens)
        assert_same_tokens(
            [t for output in outputs for t in unpack_int32(output.new_token_ids).tolist()],
            expected[name],
            name,
        )
    assert cached[1] == cached[3] > cached[2]
    assert cached[2] <= request.items[0].spans[0].offset
    salted, ready = rig.request(chats["A"], "other tenant", cache_salt=b"x")
    rig.engine.handle(salted, rig.now)
    rig.engine.handle(ready[0], rig.now)
    rig.run()
    assert rig.outputs()[0].num_cached_tokens == 0


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
@pytest.mark.parametrize("has_prefix_cache", [False, True], ids=["no cache", "cache"])
def test_preempted_requests_go_on_with_the_same_tokens(
    has_prefix_cache: bool, has_overlap: bool, random_checkpoint: Path, references: dict[str, Answer]
) -> None:
    """The cache holds the prompts and little more. Pictures that are needed again are leased again."""
    num_blocks = sum(-(-len(references[name].prompt_token_ids) // 4) for name in CHATS) + len(CHATS) + 6
    rig = Rig(random_checkpoint, 400, block_size=4, num_blocks=num_blocks, has_overlap=has_overlap)
    rig.scheduler.prefixes.has_cache = has_prefix_cache
    rig.open_pool()
    handles = {}
    for name, chat in CHATS.items():
        request, ready = rig.request(chat, name)
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            handles[embedding.key] = embedding
            rig.engine.handle(embedding, rig.now)
    num_leased_again = 0
    while rig.engine.step(rig.now):
        rig.engine.check_integrity()
        for again in rig.vit.take(LeaseRequest):
            num_leased_again += 1
            rig.engine.handle(
                msgspec.structs.replace(handles[again.key], lease_id=next(rig.lease_ids)), rig.now
            )
    assert rig.scheduler.num_preemptions > 0
    assert num_leased_again > 0 or has_prefix_cache
    outputs = rig.outputs()
    for name in CHATS:
        tokens = [
            t
            for output in outputs
            if output.request_id == name
            for t in unpack_int32(output.new_token_ids).tolist()
        ]
        assert_same_tokens(tokens, references[name], name)
    released = [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids]
    assert len(released) == len(set(released)) == len(handles) + num_leased_again


def test_a_picture_that_no_vit_has_any_more_interrupts_its_request(random_checkpoint: Path) -> None:
    name = "one picture"
    rig = Rig(random_checkpoint, 64)
    rig.open_pool()
    rig.scheduler.prefixes.has_cache = False
    request, ready = rig.request(CHATS[name], "r")
    rig.engine.handle(request, rig.now)
    rig.engine.handle(ready[0], rig.now)
    for _ in range(5):
        rig.engine.step(rig.now)
    so_far = [t for output in rig.outputs() for t in unpack_int32(output.new_token_ids).tolist()]
    rig.scheduler._preempt(rig.scheduler.running[0])
    rig.engine.step(rig.now)
    (again,) = rig.vit.take(LeaseRequest)
    assert (again.key, again.mm_hash) == (ready[0].key, request.items[0].mm_hash)
    rig.engine.handle(LeaseRefused(sender=VIT_0, epoch=1, key=again.key), rig.now)
    assert [message.attempt for message in rig.publisher.take(Interrupted)] == [1]
    assert not rig.engine.requests
    rig.engine.check_integrity()
    rig.engine.handle(query("r"), rig.now)
    assert len(rig.publisher.take(Interrupted)) == 1, "a client that missed it asks"
    rig.engine.handle(msgspec.structs.replace(request, attempt=2, choices=behind(so_far)), rig.now)
    rig.engine.handle(msgspec.structs.replace(ready[0], key=ChunkKey("r", 2, 0, 0), lease_id=99), rig.now)
    rig.run()
    answer = Reference(random_checkpoint).answer(CHATS[name], NUM_TOKENS)
    assert_same_tokens(so_far + rig.tokens("r"), answer)


def test_a_preempted_request_gives_its_leases_back_when_no_step_reads_them(random_checkpoint: Path) -> None:
    rig = Rig(random_checkpoint, 16, has_overlap=True)
    rig.open_pool()
    request, ready = rig.request(CHATS["very different sizes"], "r")
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(embedding, rig.now)
    for _ in range(3):
        rig.engine.step(rig.now)
    before = {lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids}
    preempted = rig.scheduler.running[0]
    rig.scheduler._preempt(preempted)
    rig.engine.stepper.give_back(preempted.take_all_leases())
    assert rig.vit.take(LeaseReleased) == [], "a step is under way"
    again: set[ChunkKey] = set()
    handles = {embedding.key: embedding for embedding in ready}
    while rig.engine.step(rig.now):
        for asked in rig.vit.take(LeaseRequest):
            again.add(asked.key)
            rig.engine.handle(
                msgspec.structs.replace(handles[asked.key], lease_id=next(rig.lease_ids)), rig.now
            )
    after = [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids]
    assert before.isdisjoint(after)
    assert len(after) == len(set(after))
    assert {embedding.lease_id for embedding in ready} <= before | set(after)
    assert again
    assert_same_tokens(
        rig.tokens("r"), Reference(random_checkpoint).answer(CHATS["very different sizes"], NUM_TOKENS)
    )


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_each_step_is_timed_by_itself(
    has_overlap: bool, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that computes while it is asked, a second a token: overlap changes when results are collected,
    not what steps took."""
    rig = Rig(random_checkpoint, 16, has_overlap=has_overlap)
    now = 0.0
    observed: list[tuple[int, float]] = []
    launch = rig.engine.runner.launch

    def take_time(plan: StepPlan) -> Any:
        nonlocal now
        now += sum(sequence.num_tokens for sequence in plan.sequences)
        return launch(plan)

    def observe(num_decodes: int, num_prefill: int, num_pairs: int, seconds: float) -> None:
        observed.append((num_decodes + num_prefill, seconds))

    monkeypatch.setattr(rig.engine.runner, "launch", take_time)
    rig.clock = lambda: now
    times = SimpleNamespace(observe=observe, num_free_tokens=lambda *_: 16, predict=lambda num_tokens: 1.0)
    monkeypatch.setattr(rig.scheduler.budget, "step_times", times)
    request, _ = rig.request(CHATS["text only"], "r")
    rig.engine.handle(request, rig.now)
    rig.run()
    assert len({num_tokens for num_tokens, _ in observed}) > 1
    assert all(seconds == num_tokens for num_tokens, seconds in observed)


def test_with_overlap_no_token_comes_after_the_end_and_leases_outlast_the_step(
    random_checkpoint: Path,
) -> None:
    rig = Rig(random_checkpoint, 64, has_overlap=True)
    rig.open_pool()
    request, ready = rig.request(CHATS["one picture"], "r")
    rig.engine.handle(request, rig.now)
    rig.engine.handle(ready[0], rig.now)
    rig.engine.step(rig.now)  # under way
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), rig.now)
    assert rig.vit.take(LeaseReleased) == [], "the step still reads it"
    rig.engine.tick(10.0)
    assert rig.vit.take(LeaseSet)[0].lease_ids == (ready[0].lease_id,)
    rig.run()
    assert [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids] == [
        ready[0].lease_id
    ]
    assert [(len(o.new_token_ids), o.finish_reason) for o in rig.outputs()] == [(0, FinishReason.ABORT)]
    text, _ = rig.request(CHATS["text only"], "s")
    rig.engine.handle(text, rig.now)
    rig.run()
    eos = unpack_int32(rig.outputs()[5].new_token_ids)[0]
    rig.scheduler.eos_token_ids = frozenset([int(eos)])
    again, _ = rig.request(
        CHATS["text only"], "t", sampling=SamplingParams(temperature=0, max_tokens=NUM_TOKENS, seed=1)
    )
    rig.engine.handle(again, rig.now)
    rig.run()
    outputs = rig.outputs()
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert len(outputs) <= 6
    rig.engine.check_integrity()


def test_logprobs_come_with_their_tokens_and_again_on_a_query(
    rig: Rig, references: dict[str, Answer]
) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, seed=1, logprobs=2)
    request, _ = rig.request(CHATS["text only"], "r", sampling=sampling)
    rig.engine.handle(request, rig.now)
    rig.run()
    outputs = rig.outputs()
    for output in outputs:
        (entry,) = output.logprobs
        chosen, best, second = unpack_int32(entry.token_ids).tolist()
        values = np.frombuffer(entry.logprobs, dtype="<f4")
        assert chosen == best == unpack_int32(output.new_token_ids)[0]
        assert values[0] == values[1] > values[2]
        assert second != best
    rig.engine.handle(query("r", num_received=(3,)), rig.now)
    (again,) = rig.outputs()
    assert again.logprobs == outputs[3].logprobs + outputs[4].logprobs


@pytest.fixture
def rig(random_checkpoint: Path) -> Rig:
    made = Rig(random_checkpoint, 64)
    made.open_pool()
    return made


def test_a_seeded_request_draws_the_same_alone_and_in_company(rig: Rig) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=NUM_TOKENS, ignore_eos=True, seed=123)
    drawn = []
    for names in (["a"], ["x", "b", "y"]):
        for name in names:
            params = sampling if name in "ab" else replace_seed(sampling, 7)
            rig.engine.handle(rig.request(CHATS["text only"], name, sampling=params)[0], rig.now)
        rig.run()
        outputs = [output for output in rig.outputs() if output.request_id in "ab"]
        drawn.append([t for output in outputs for t in unpack_int32(output.new_token_ids).tolist()])
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 5


def test_a_request_without_a_seed_draws_on_in_its_next_attempt(rig: Rig) -> None:
    """The seed is a digest of the id, and the number of a draw counts the output tokens of all attempts."""
    sampling = SamplingParams(temperature=1.5, max_tokens=NUM_TOKENS, ignore_eos=True, frequency_penalty=0.2)

    def run(request_id: str, attempt: int, so_far: list[int]) -> list[int]:
        options = {"attempt": attempt, "choices": behind(so_far), "sampling": sampling}
        rig.engine.handle(rig.request(CHATS["text only"], request_id, **options)[0], rig.now)
        rig.run()
        return so_far + [t for output in rig.outputs() for t in unpack_int32(output.new_token_ids).tolist()]

    whole = run("r", 1, [])
    assert len(set(whole)) > 5
    assert run("r", 2, whole[:7]) == whole
    assert run("other", 1, []) != whole


def replace_seed(sampling: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature, max_tokens=sampling.max_tokens, ignore_eos=True, seed=seed
    )


def test_a_query_is_answered_with_what_was_missed(rig: Rig) -> None:
    request, _ = rig.request(CHATS["text only"], "r")
    rig.engine.handle(request, rig.now)
    for _ in range(6):
        rig.engine.step(rig.now)
    before = [token for output in rig.outputs() for token in unpack_int32(output.new_token_ids).tolist()]
    rig.publisher.take(Accepted)
    rig.engine.handle(request, rig.now)
    assert (rig.publisher.take(Accepted), rig.outputs()) == ([], []), "an attempt runs once"
    missed = query("r", num_received=(2,))
    rig.engine.handle(missed, rig.now)
    assert len(rig.publisher.take(Accepted)) == 1
    (again,) = rig.outputs()
    assert (again.offset, unpack_int32(again.new_token_ids).tolist(), again.finish_reason) == (
        2,
        before[2:],
        None,
    )
    rig.run()
    rig.publisher.published.clear()
    rig.engine.handle(missed, rig.now)
    (terminal,) = rig.outputs()
    assert len(terminal.new_token_ids) // 4 == NUM_TOKENS - 2
    assert terminal.finish_reason is FinishReason.LENGTH
    assert not rig.engine.step(rig.now), "a query must not run a request again"


def test_a_higher_attempt_replaces_a_lower_one_is_refused(rig: Rig) -> None:
    name = "one picture"
    first, ready = rig.request(CHATS[name], "r")
    rig.engine.handle(first, rig.now)
    rig.engine.handle(ready[0], rig.now)
    second, _ = rig.request(CHATS[name], "r", attempt=2)
    rig.engine.handle(second, rig.now)
    assert [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids] == [
        ready[0].lease_id
    ]
    assert rig.engine.requests["r"].attempt == 2
    rig.engine.handle(first, rig.now)
    assert rig.engine.requests["r"].attempt == 2
    rig.engine.handle(ready[0], rig.now)  # of the first attempt: nobody wants it
    assert [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids] == [
        ready[0].lease_id
    ]
    rig.engine.check_integrity()


def test_abort_frees_all_and_is_answered_each_time(rig: Rig) -> None:
    request, ready = rig.request(CHATS["three pictures between texts"], "r")
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(embedding, rig.now)
    rig.engine.step(rig.now)
    abort = AbortRequest(client_id=CLIENT, request_id="r", attempt=1)
    rig.engine.handle(AbortRequest(client_id=b"x" * 16, request_id="r", attempt=1), rig.now)
    assert "r" in rig.engine.requests, "only its own client may abort a request"
    for _ in range(2):
        rig.engine.handle(abort, rig.now)
        assert [output.finish_reason for output in rig.outputs()][-1] is FinishReason.ABORT
    assert (
        rig.feedback.take(RequestEnded)
        == [RequestEnded(sender=LLM_0, epoch=1, client_id=CLIENT, request_id="r", attempt=1)] * 2
    ), "one an abort"
    released = [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids]
    assert sorted(released) == sorted(embedding.lease_id for embedding in ready)
    rig.engine.check_integrity()


def test_a_refusal_before_the_request_holds(rig: Rig) -> None:
    request, ready = rig.request(CHATS["one picture"], "r")
    rig.engine.handle(ready[0], rig.now)
    rig.engine.handle(
        RequestRefused(
            sender=PREPROCESS,
            epoch=1,
            client_id=CLIENT,
            request_id="r",
            attempt=1,
            error=ErrorInfo(400, "broken", "f"),
        ),
        rig.now,
    )
    rig.engine.handle(request, rig.now)
    assert not rig.engine.requests
    failures = rig.publisher.take(RequestFailed)
    assert [failure.error.message for failure in failures] == ["broken", "broken"]
    assert [lease for message in rig.vit.take(LeaseReleased) for lease in message.lease_ids] == [
        ready[0].lease_id
    ]


def test_a_failed_encode_ends_its_request_only(rig: Rig) -> None:
    for name in ("a", "b"):
        rig.engine.handle(rig.request(CHATS["text only" if name == "a" else "one picture"], name)[0], rig.now)
    rig.engine.handle(
        EncodeFailed(sender=VIT_0, epoch=1, key=ChunkKey("b", 1, 0, 0), error=ErrorInfo(400, "too large")),
        rig.now,
    )
    (failure,) = rig.publisher.take(RequestFailed)
    assert failure.request_id == "b"
    rig.run()
    assert len(rig.tokens("a")) == NUM_TOKENS


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(rig: Rig) -> None:
    request, _ = rig.request([("user", ["word " * 1200])], "r")
    rig.engine.handle(request, rig.now)
    (failure,) = rig.publisher.take(RequestFailed)
    assert failure.error.status == 400
    assert failure.error.field == "messages"
    assert "1000" in failure.error.message
    assert not rig.engine.requests


def test_lease_sets_name_what_is_held(rig: Rig) -> None:
    request, ready = rig.request(CHATS["three pictures between texts"], "r")
    rig.engine.handle(request, rig.now)
    for embedding in (ready[0], ready[2]):
        rig.engine.handle(embedding, rig.now)
    rig.engine.tick(10.0)
    (held,) = rig.vit.take(LeaseSet)
    assert held.lease_ids == (ready[0].lease_id, ready[2].lease_id)
    assert held.last_lease_id == ready[2].lease_id
    rig.engine.step(rig.now)  # reads the first picture, and waits at the second
    rig.engine.tick(20.0)
    assert rig.vit.take(LeaseSet)[0].lease_ids == (ready[2].lease_id,)


def test_a_client_that_leaves_loses_its_requests_after_a_grace(rig: Rig) -> None:
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    rig.engine.on_subscriptions([Subscription(CLIENT, False)], 100.0)
    rig.engine.tick(100.5)
    assert "r" in rig.engine.requests
    rig.engine.on_subscriptions([Subscription(CLIENT, True)], 100.7)
    rig.engine.tick(103.0)
    assert "r" in rig.engine.requests, "it came back in time"
    rig.engine.on_subscriptions([Subscription(CLIENT, False)], 110.0)
    rig.engine.tick(112.1)
    assert not rig.engine.requests
    rig.engine.check_integrity()


def test_a_slow_client_is_cut_off_and_others_are_not(rig: Rig) -> None:
    other = b"o" * 16
    rig.greet(other)
    rig.engine.handle(rig.request(CHATS["text only"], "slow")[0], rig.now)
    good = msgspec.structs.replace(rig.request(CHATS["text only"], "good")[0], client_id=other)
    rig.engine.handle(good, rig.now)
    rig.publisher.full.add(CLIENT)
    rig.engine.step(rig.now)
    rig.engine.tick(5.0)
    assert list(rig.engine.requests) == ["good"]
    rig.run()
    assert len(rig.tokens("good")) == NUM_TOKENS
    assert rig.engine.num_clients_cut_off == 1


def test_only_subscribed_clients_are_welcomed(rig: Rig) -> None:
    rig.engine.handle(Hello(client_id=b"u" * 16, protocol=PROTOCOL_VERSION), rig.now)
    assert rig.publisher.take(Welcome) == []
    rig.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), rig.now)
    assert len(rig.publisher.take(Welcome)) == 1


def test_a_client_that_connects_again_without_a_word_is_to_say_hello(rig: Rig) -> None:
    """A broken connection shows here, while the client may not have noticed."""
    rig.engine.on_subscriptions([Subscription(CLIENT, False)], rig.now)
    rig.engine.on_subscriptions([Subscription(CLIENT, True)], rig.now)
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    assert "hello" in rig.publisher.take(Interrupted)[0].reason
    assert not rig.publisher.take(RequestFailed)
    rig.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), rig.now)
    rig.engine.handle(rig.request(CHATS["text only"], "r", attempt=2)[0], rig.now)
    rig.run()
    assert len(rig.tokens("r")) == NUM_TOKENS


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_request_id_of_another_client_is_refused_and_its_request_goes_on(rig: Rig, has_ended: bool) -> None:
    """Preprocess refuses it, too, but a new one knows of nothing."""
    other = b"o" * 16
    rig.greet(other)
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    if has_ended:
        rig.run()
    rig.engine.handle(
        msgspec.structs.replace(rig.request(CHATS["text only"], "r")[0], client_id=other, attempt=2), rig.now
    )
    (failed,) = rig.publisher.take(RequestFailed)
    assert failed.error.status == 409
    rig.run()
    assert len(rig.tokens("r")) == NUM_TOKENS


def test_a_client_of_another_version_is_refused(rig: Rig) -> None:
    other = b"o" * 16
    rig.engine.on_subscriptions([Subscription(other, True)], rig.now)
    rig.engine.handle(Hello(client_id=other, protocol=99), rig.now)
    assert rig.publisher.take(Welcome)[0].protocol == PROTOCOL_VERSION, "so that it can tell by itself"
    rig.engine.handle(
        msgspec.structs.replace(rig.request(CHATS["text only"], "r")[0], client_id=other), rig.now
    )
    (failed,) = rig.publisher.take(RequestFailed)
    assert failed.error.status == 400
    assert f"speaks protocol 99, the pipeline speaks protocol {PROTOCOL_VERSION}" in failed.error.message


def test_messages_of_dead_epochs_are_dropped_and_counted(rig: Rig) -> None:
    rig.engine.intake.epochs = {VIT_0: 2, PREPROCESS: 2}
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    assert not rig.engine.requests
    assert rig.engine.counters["stale_messages"] == 1


def test_a_request_of_a_client_that_left_does_not_run(rig: Rig) -> None:
    rig.engine.on_subscriptions([Subscription(CLIENT, False)], 0.0)
    rig.engine.tick(10.0)
    rig.engine.handle(rig.request(CHATS["one picture"], "r")[0], 10.0)
    assert not rig.engine.requests
    assert [ended.request_id for ended in rig.feedback.take(RequestEnded)] == ["r"]
    rig.engine.check_integrity()


def test_a_late_hello_does_not_revive_a_client_that_left(rig: Rig) -> None:
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    rig.engine.on_subscriptions([Subscription(CLIENT, False)], 100.0)
    rig.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 101.0)
    rig.engine.tick(103.0)
    assert not rig.engine.requests


def test_a_client_that_was_cut_off_is_served_again_after_hello(rig: Rig) -> None:
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    rig.publisher.full.add(CLIENT)
    rig.engine.step(rig.now)
    rig.engine.tick(5.0)
    rig.publisher.full.clear()
    rig.engine.handle(Hello(client_id=CLIENT, protocol=PROTOCOL_VERSION), 6.0)
    rig.engine.handle(rig.request(CHATS["text only"], "next")[0], 6.0)
    rig.run()
    assert len(rig.tokens("next")) == NUM_TOKENS


def test_a_failed_encode_may_come_before_its_request(rig: Rig) -> None:
    request, _ = rig.request(CHATS["one picture"], "r")
    rig.engine.handle(
        EncodeFailed(sender=VIT_0, epoch=1, key=ChunkKey("r", 1, 0, 0), error=ErrorInfo(400, "too large")),
        rig.now,
    )
    rig.engine.handle(request, rig.now)
    assert [failure.error.message for failure in rig.publisher.take(RequestFailed)] == ["too large"]
    assert not rig.engine.requests


def test_embeddings_of_an_attempt_that_is_not_here_yet_are_kept(rig: Rig) -> None:
    request, ready = rig.request(CHATS["one picture"], "r")
    rig.engine.handle(request, rig.now)
    early = msgspec.structs.replace(ready[0], key=ChunkKey("r", 2, 0, 0))
    rig.engine.handle(early, rig.now)
    assert rig.vit.take(LeaseReleased) == []
    rig.engine.handle(msgspec.structs.replace(request, attempt=2), rig.now)
    rig.run()
    assert len(rig.tokens("r")) == NUM_TOKENS


def test_what_preprocess_answers_to_a_query_goes_to_its_client_only(rig: Rig) -> None:
    other = b"o" * 16
    rig.greet(other)
    asked = Preparing(sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id="r", attempt=2)
    rig.engine.handle(asked, rig.now)
    (told,) = rig.publisher.take(Preparing)
    assert (told.sender, told.request_id, told.attempt) == (LLM_0, "r", 2)
    rig.engine.handle(msgspec.structs.replace(asked, client_id=b"unknown"), rig.now)
    assert rig.publisher.take(Preparing) == []
    assert rig.engine.requests == {}


def test_a_query_never_starts_a_request(rig: Rig) -> None:
    rig.engine.handle(query("r"), rig.now)
    assert not rig.engine.requests
    assert [ended.request_id for ended in rig.feedback.take(RequestEnded)] == ["r"]
    (told,) = rig.publisher.take(Interrupted)
    assert (told.request_id, told.attempt, told.died) == ("r", 1, None), "its client is to submit it again"


def test_preprocess_always_hears_that_a_request_is_over(rig: Rig) -> None:
    """Also of one that ended before it began: else its credit would be gone for ever."""
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), rig.now)
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    assert [ended.attempt for ended in rig.feedback.take(RequestEnded)] == [1, 1]


def test_preprocess_hears_whether_a_request_may_come_again(rig: Rig) -> None:
    """Only what was interrupted goes on there though the server be full; also when that is said again."""
    interrupted, _ = rig.request(CHATS["one picture"], "interrupted")
    for request in (interrupted, rig.request(CHATS["text only"], "whole")[0]):
        rig.engine.handle(request, rig.now)
    rig.engine.on_death(successor(VIT_0), rig.now)
    rig.run()
    rig.engine.handle(interrupted, rig.now)
    told = [(ended.request_id, ended.is_interrupted) for ended in rig.feedback.take(RequestEnded)]
    assert told == [("interrupted", True), ("whole", False), ("interrupted", True)]


def test_a_foreign_request_id_is_refused_to_its_sender_only(rig: Rig) -> None:
    other = b"o" * 16
    rig.greet(other)
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    refusal = RequestNotYours(sender=PREPROCESS, epoch=1, client_id=other, request_id="r", attempt=1)
    rig.engine.handle(refusal, rig.now)
    assert rig.feedback.take(RequestEnded) == []
    failures = [(topic, m.error) for topic, m in rig.publisher.published if isinstance(m, RequestFailed)]
    assert [(topic, error.status, error.field) for topic, error in failures] == [(other, 409, "request_id")]
    rig.run()
    assert len(rig.tokens("r")) == NUM_TOKENS


@pytest.mark.parametrize("count", [NUM_TOKENS, 5000])
def test_more_output_than_was_asked_for_is_refused(count: int, rig: Rig) -> None:
    rig.engine.handle(rig.request(CHATS["text only"], "r", choices=behind([20] * count))[0], rig.now)
    (failure,) = rig.publisher.take(RequestFailed)
    assert failure.error.status == 400
    rig.engine.check_integrity()


def test_logprobs_go_on_behind_an_earlier_attempt(rig: Rig, references: dict[str, Answer]) -> None:
    so_far = references["text only"].token_ids[:10]
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1, logprobs=1)
    options = {"attempt": 2, "choices": behind(so_far), "sampling": sampling}
    request, _ = rig.request(CHATS["text only"], "r", **options)
    rig.engine.handle(request, rig.now)
    rig.run()
    for output in rig.outputs():
        (entry,) = output.logprobs
        assert unpack_int32(entry.token_ids)[0] == unpack_int32(output.new_token_ids)[0]
    rig.engine.handle(query("r", attempt=2, num_received=(12,)), rig.now)
    (again,) = rig.outputs()
    chosen = [int(unpack_int32(entry.token_ids)[0]) for entry in again.logprobs]
    assert chosen == unpack_int32(again.new_token_ids).tolist()


def test_output_of_an_earlier_attempt_is_gone_on_from(rig: Rig, references: dict[str, Answer]) -> None:
    so_far = references["text only"].token_ids[:10]
    rig.engine.handle(rig.request(CHATS["text only"], "r", attempt=2, choices=behind(so_far))[0], rig.now)
    rig.run()
    outputs = rig.outputs()
    assert outputs[0].offset == 10
    tokens = [t for output in outputs for t in unpack_int32(output.new_token_ids).tolist()]
    assert_same_tokens(so_far + tokens, references["text only"])


def test_a_rank_that_lags_stops_the_pipeline(rig: Rig) -> None:
    rig.ranks_keep_up = False
    rig.engine.handle(rig.request(CHATS["text only"], "r")[0], rig.now)
    with pytest.raises(PipelineError, match="does not keep up"):
        rig.engine.step(rig.now)


# The death of neighbours.


def successor(worker: WorkerId, *executed: str) -> WorkerState:
    return WorkerState(worker, 2, False, executed=tuple(map(digest_of, executed)))


def test_with_a_vit_go_the_requests_that_have_not_read_what_it_had(rig: Rig) -> None:
    rig.open_pool()
    rig.engine.intake.epochs = {VIT_0: 1}
    (read, ready), (waiting, _), text = (
        rig.request(CHATS["one picture"], "read"),
        rig.request(CHATS["one picture"], "waiting"),
        "text",
    )
    other = rig.request(CHATS["three pictures between texts"], "unread")
    rig.engine.handle(read, rig.now)
    rig.engine.handle(ready[0], rig.now)
    rig.engine.step(rig.now)
    rig.engine.handle(rig.request(CHATS["text only"], text)[0], rig.now)
    rig.engine.handle(waiting, rig.now)
    rig.engine.handle(other[0], rig.now)
    rig.engine.handle(other[1][2], rig.now)
    rig.vit.take()
    rig.engine.intake.epochs = {VIT_0: 2}
    rig.engine.on_death(successor(VIT_0, "waiting"), rig.now)
    assert {told.request_id: told.died for told in rig.publisher.take(Interrupted)} == {
        "waiting": Role.VIT,
        "unread": None,
    }
    assert not rig.engine.runner.pools.knows("vit.0", 1)
    rig.run()
    assert len(rig.tokens("read")) == NUM_TOKENS
    assert rig.vit.take(LeaseReleased) == [], "its successor has never heard of these leases"
    rig.engine.check_integrity()


def test_a_request_that_names_a_dead_vit_is_interrupted_at_once(rig: Rig) -> None:
    rig.engine.intake.epochs = {VIT_0: 2}
    rig.engine.handle(rig.request(CHATS["one picture"], "r")[0], rig.now)
    (told,) = rig.publisher.take(Interrupted)
    assert (told.reason, told.died) == ("vit.0 died", None)
    assert not rig.engine.requests


def test_an_abort_of_an_older_attempt_keeps_what_came_early_for_the_next(rig: Rig) -> None:
    rig.open_pool()
    request, ready = rig.request(CHATS["one picture"], "r", attempt=2)
    rig.engine.handle(msgspec.structs.replace(ready[0], key=ChunkKey("r", 2, 0, 0)), rig.now)
    rig.engine.handle(AbortRequest(client_id=CLIENT, request_id="r", attempt=1), rig.now)
    rig.engine.handle(request, rig.now)
    rig.run()
    assert rig.outputs()[-1].finish_reason is not None


def test_what_a_dead_vit_sent_early_is_dropped_and_its_successors_leases_count_anew(rig: Rig) -> None:
    rig.open_pool()
    request, ready = rig.request(CHATS["one picture"], "r")
    rig.engine.handle(ready[0], rig.now)
    rig.engine.intake.epochs = {VIT_0: 2}
    rig.engine.on_death(successor(VIT_0), rig.now)
    rig.engine.tick(rig.now)
    (told,) = rig.vit.take(LeaseSet)
    assert (told.lease_ids, told.last_lease_id) == ((), 0)
    rig.engine.handle(request, rig.now)
    assert len(rig.publisher.take(Interrupted)) == 1


def test_with_preprocess_go_the_requests_that_wait_for_pictures(rig: Rig) -> None:
    rig.open_pool()
    (read, ready), (waiting, _) = (
        rig.request(CHATS["one picture"], "read"),
        rig.request(CHATS["one picture"], "waiting"),
    )
    rig.engine.handle(read, rig.now)
    rig.engine.handle(ready[0], rig.now)
    rig.engine.handle(waiting, rig.now)
    rig.engine.on_death(successor(PREPROCESS, "waiting", "read"), rig.now)
    assert [(told.request_id, told.died) for told in rig.publisher.take(Interrupted)] == [
        ("waiting", Role.PREPROCESS)
    ]
    rig.run()
    assert len(rig.tokens("read")) == NUM_TOKENS


def test_who_executes_is_recorded_before_a_step_and_nobody_behind_it(rig: Rig) -> None:
    for name in ("a", "b"):
        rig.engine.handle(
            rig.request(CHATS["text only"], name, sampling=SamplingParams(max_tokens=1))[0], rig.now
        )
    rig.run()
    assert rig.records == [{"a", "b"}, set()]


def test_who_has_yielded_a_token_is_no_longer_recorded(rig: Rig) -> None:
    """Should a rank die now, it was not because of that request, and it need not run alone."""
    rig.engine.handle(rig.request(CHATS["text only"], "a")[0], rig.now)
    while not rig.first_tokens:
        rig.engine.step(rig.now)
    rig.engine.handle(rig.request(CHATS["text only"], "b")[0], rig.now)
    rig.run()
    assert rig.records == [{"a"}, set(), {"b"}, set()]


def test_a_resubmitted_request_goes_on_as_if_nothing_had_been(rig: Rig) -> None:
    rig.engine.handle(rig.request(CHATS["text only"], "whole")[0], rig.now)
    rig.run()
    whole = rig.tokens("whole")
    request = rig.request(CHATS["text only"], "again", attempt=2, choices=behind(whole[:9]))[0]
    rig.engine.handle(request, rig.now)
    rig.run()
    assert rig.tokens("again") == whole[9:]
    assert rig.first_tokens == ["whole", "again"], "once an attempt"
