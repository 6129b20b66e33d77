"""Qwen3.5 through engine, scheduler, cache and runner: its states survive company, preemption, a death, and
choices of one prompt. Greedy tokens are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pipeline.config import Config, LlmConfig
from pipeline.wire.clients import ChoiceProgress
from pipeline.wire.encoding import LeaseRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.chats import ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import Rig
from tests.pictures import noise, scene
from tests.reference import Answer, Reference, assert_same_tokens
from workers.llm.cache.plan import CachePlan
from workers.llm.start import make_scheduler

NUM_TOKENS = 40
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
FILM = tuple(scene(number, (128, 96)) for number in range(70, 76))
TEXT = "The quick brown fox jumps over the lazy dog. " * 6
CHATS: dict[str, ChatTurns] = {
    "text": [("user", [TEXT, "Why?"])],
    "picture": [("user", [noise(1, (160, 160)), "What is it?"])],
    "video": [("user", [FILM, TEXT, "How does it end?"])],
}


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Answer]:
    reference = Reference(folder)
    return {name: reference.answer(chat, NUM_TOKENS) for name, chat in CHATS.items()}


def submit(rig: Rig, prefix: str = "") -> dict[Any, Any]:
    """All chats; the embeddings that came with them."""
    handles = {}
    for name, chat in CHATS.items():
        request, ready = rig.request(chat, prefix + name, sampling=GREEDY)
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            handles[embedding.key] = embedding
            rig.engine.handle(embedding, rig.now)
    return handles


def check(rig: Rig, answers: dict[str, Answer], num_earlier: int = 0, prefix: str = "") -> None:
    outputs = rig.outputs()
    for name, answer in answers.items():
        mine = [output for output in outputs if output.request_id == prefix + name]
        tokens = [token for output in mine for token in unpack_int32(output.new_token_ids).tolist()]
        wanted = answer._replace(token_ids=answer.token_ids[num_earlier:], gaps=answer.gaps[num_earlier:])
        assert_same_tokens(tokens, wanted, name)
        assert all(output.num_cached_tokens == 0 for output in mine)


@pytest.mark.parametrize("has_overlap", [False, True], ids=["alone", "overlap"])
def test_company_changes_nothing(has_overlap: bool, folder: Path, answers: dict[str, Answer]) -> None:
    assert min(len(answer.prompt_token_ids) for answer in answers.values()) < 64
    assert max(len(answer.prompt_token_ids) for answer in answers.values()) > 128
    rig = Rig(folder, 100, block_size=4, has_overlap=has_overlap)
    rig.open_pool()
    for prefix in ("first ", "again "):  # slots are used again
        submit(rig, prefix)
        rig.run()
        check(rig, answers, prefix=prefix)
    rig.scheduler.cache.check_empty()


def test_whoever_is_preempted_is_computed_again(folder: Path, answers: dict[str, Answer]) -> None:
    num_blocks = sum(-(-len(answer.prompt_token_ids) // 4) for answer in answers.values()) + len(CHATS) + 6
    rig = Rig(folder, 100, block_size=4, num_blocks=num_blocks)
    rig.open_pool()
    handles = submit(rig)
    while rig.engine.step(rig.now):
        rig.engine.check_integrity()
        for again in rig.vit.take(LeaseRequest):
            leased = msgspec.structs.replace(handles[again.key], lease_id=next(rig.lease_ids))
            rig.engine.handle(leased, rig.now)
    assert rig.scheduler.num_preemptions > 0
    check(rig, answers)


@pytest.mark.parametrize("num_earlier", [1, 25])
def test_a_resubmission_goes_on_with_the_same_text(
    num_earlier: int, folder: Path, answers: dict[str, Answer]
) -> None:
    """Its tokens were computed one by one before, and now in chunks."""
    rig = Rig(folder, 100, block_size=4)
    rig.open_pool()
    for name, chat in CHATS.items():
        progress = ChoiceProgress(pack_int32(answers[name].token_ids[:num_earlier]))
        request, ready = rig.request(chat, name, sampling=GREEDY, attempt=2, choices=(progress,))
        rig.engine.handle(request, rig.now)
        for embedding in ready:
            key = embedding.key._replace(attempt=2)
            rig.engine.handle(msgspec.structs.replace(embedding, key=key), rig.now)
    rig.run()
    check(rig, answers, num_earlier)


def test_choices_compute_the_prompt_each_for_itself(folder: Path, answers: dict[str, Answer]) -> None:
    rig = Rig(folder, 100, block_size=4)
    rig.open_pool()
    request, _ = rig.request(CHATS["text"], "r", sampling=msgspec.structs.replace(GREEDY, n=3))
    rig.engine.handle(request, rig.now)
    rig.run()
    said: dict[int, list[int]] = {}
    for output in rig.outputs():
        said.setdefault(output.index, []).extend(unpack_int32(output.new_token_ids).tolist())
    assert sorted(said) == [0, 1, 2]
    for index, tokens in said.items():
        assert_same_tokens(tokens, answers["text"], f"choice {index}")


@pytest.mark.interpreter
@pytest.mark.parametrize("folder", ["qwen3_5"], indirect=True)
def test_the_way_of_a_gpu_gives_the_same_tokens(
    folder: Path, answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels in the interpreter, with padded batches of two choices. Prompts are in chunks, as in
    16 bits."""
    from workers.nn.delta import triton

    monkeypatch.setattr(triton, "WALKED", ())
    monkeypatch.setattr(triton, "CONVOLVED_ROWS", 64)  # the interpreter's time is that of its programs
    count = 3
    rig = Rig(folder, 100, block_size=4, has_overlap=True, attention="triton", linear_attention="triton")
    rig.open_pool()
    sampling = msgspec.structs.replace(GREEDY, max_tokens=count, n=2)
    request, _ = rig.request(
        CHATS["text"], "text", sampling=sampling
    )  # a picture takes the interpreter minutes
    rig.engine.handle(request, rig.now)
    rig.run()
    outputs = rig.outputs()
    for index in range(2):
        mine = [output for output in outputs if output.index == index]
        tokens = [token for output in mine for token in unpack_int32(output.new_token_ids).tolist()]
        answer = answers["text"]
        wanted = answer._replace(token_ids=answer.token_ids[:count], gaps=answer.gaps[:count])
        assert_same_tokens(tokens, wanted, f"choice {index}")


def test_the_log_says_how_memory_is_divided_and_whether_prefixes_are_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(folder, 100)
    context: Any = SimpleNamespace(
        config=Config(llm=LlmConfig(prefix_caching=True)),
        quarantine=SimpleNamespace(runs_alone=None),
        model_folder=folder,
    )
    with caplog.at_level("INFO"):
        runner: Any = rig.engine.stepper.runner
        scheduler = make_scheduler(context, rig.info, CachePlan(10, 160, 3), runner.decoder)
    assert (scheduler.max_num_seqs, scheduler.cache.has_prefixes) == (3, False)
    assert "for 160 tokens; states have 0.00 GiB for 3 sequences at once and 0 prefixes" in caplog.text
    assert "prefix caching is off: the memory holds no states of prefixes" in caplog.text
    caplog.clear()
    scheduler = make_scheduler(context, rig.info, CachePlan(10, 160, 3, 2), runner.decoder)
    assert scheduler.cache.has_prefixes
    assert "prefix caching is off" not in caplog.text
