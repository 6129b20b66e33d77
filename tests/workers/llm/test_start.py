"""A rank on a GPU waits for the ViTs, and says so."""

from __future__ import annotations

import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.config import Config, LlmConfig, ModelConfig, PreprocessConfig
from pipeline.config.api import MAX_CONNECTIONS
from pipeline.config.preprocess import MAX_OPEN_CHUNKS
from pipeline.process.nodes import NodeMap
from pipeline.process.phases import WAITING
from pipeline.process.process import ShutdownRequested, WorkerContext
from pipeline.process.quarantine import Quarantine
from pipeline.transport.ends import HIGH_WATER_MARK
from pipeline.transport.sockets import Sockets
from pipeline.wire.control import PipelineState, WorkerState
from pipeline.wire.topology import CONTROL, Role, WorkerId
from tests.fakes import LLM_0, VIT_0
from workers.llm.cache.spec import Paged, State
from workers.llm.speculation.ngram import NgramProposer
from workers.llm.start import (
    check_linear_attention,
    has_overlap,
    make_drafter,
    make_welcome,
    most_drafts,
    wait_for_vits,
)
from workers.preprocess.credits import Credits

VIT_1 = WorkerId(Role.VIT, 1)


def states(*ready: WorkerId) -> PipelineState:
    workers = (LLM_0, VIT_0, VIT_1)
    return PipelineState(workers=tuple(WorkerState(worker, 1, worker in ready) for worker in workers))


def test_what_is_waited_for_is_told_with_every_word_of_the_launcher(tmp_path: Path) -> None:
    sockets = Sockets(tmp_path, {})
    publisher, control = sockets.publisher(CONTROL), sockets.subscriber(CONTROL)
    while not publisher.subscriptions():
        time.sleep(0.01)
    told: list[Any] = []
    context: Any = SimpleNamespace(
        progress=lambda *told_now: told.append(told_now), sockets=sockets, worker=LLM_0, epoch=1,
        quarantine=Quarantine(Role.LLM, {}), lanes=SimpleNamespace(watch=lambda is_watched: None),
        nodes=NodeMap(None),
    )  # fmt: skip
    context.follow = partial(WorkerContext.follow, context)
    context.read_control = partial(WorkerContext.read_control, context)
    waiting = threading.Thread(target=wait_for_vits, args=(context, control))
    waiting.start()
    for number, message in enumerate((states(), states(VIT_1), states(VIT_1)), 1):
        publisher.publish(message)
        while len(told) < number and waiting.is_alive():
            time.sleep(0.01)
    publisher.publish(states(VIT_0, VIT_1))
    waiting.join(10)
    assert not waiting.is_alive()
    assert told == [(f"{WAITING}vit.0, vit.1", 0, 2), *[(f"{WAITING}vit.0", 1, 2)] * 2]
    publisher.publish(states())
    publisher.publish(PipelineState(workers=(), end=""))
    with pytest.raises(ShutdownRequested):
        wait_for_vits(context, control)
    sockets.close()


def welcomed(tmp_path: Path, max_open_requests: int) -> int:
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    config = Config(
        model=ModelConfig(served_model_name=("m",)),
        preprocess=PreprocessConfig(max_open_requests=max_open_requests),
    )
    context: Any = SimpleNamespace(config=config, model_folder=tmp_path, origin={"sender": LLM_0, "epoch": 1})
    return make_welcome(context, 100).max_requests


def test_what_one_tenant_sends_leaves_the_endpoint_room_for_all_others(tmp_path: Path) -> None:
    """The endpoint is one client. Before, 256 requests of a tenant that were not refused yet were enough."""
    for limit in (1, 2048, 20_000):
        credits = Credits(limit, 1)
        assert welcomed(tmp_path, limit) >= limit + MAX_CONNECTIONS  # which are not refused yet
        while credits.num_requests < 2 * limit:  # after a death they may be twice as many
            credits.open(f"resubmitted {credits.num_requests % 4}", was_begun=True)
        assert welcomed(tmp_path, limit) >= credits.num_requests + MAX_CONNECTIONS


def test_a_client_never_fills_an_edge(tmp_path: Path) -> None:
    assert 4 * welcomed(tmp_path, MAX_OPEN_CHUNKS) <= HIGH_WATER_MARK


def test_steps_that_follow_guesses_do_not_overlap() -> None:
    gpu, cpu, guesses = torch.device("cuda"), torch.device("cpu"), LlmConfig(speculative="ngram")
    assert has_overlap(LlmConfig(), gpu)
    assert not has_overlap(LlmConfig(), cpu)
    assert has_overlap(LlmConfig(overlap="on"), cpu)
    assert not has_overlap(guesses, gpu)
    with pytest.raises(ValueError, match="overlap is 'on'"):
        LlmConfig(speculative="ngram", overlap="on")


def test_a_step_has_so_many_drafts_at_most() -> None:
    assert most_drafts(LlmConfig()) == 0
    assert most_drafts(LlmConfig(speculative="ngram")) == 15
    assert most_drafts(LlmConfig(speculative="ngram", speculative_tokens=3, max_num_seqs=2)) == 6


def test_linear_attention_is_for_models_that_have_it() -> None:
    paged, state = Paged(2, 64), State((8,), torch.float32)
    check_linear_attention(LlmConfig(), [paged])
    check_linear_attention(LlmConfig(linear_attention="triton"), [paged, state])
    with pytest.raises(ValueError, match="linear_attention 'triton' is for models with layers of linear"):
        check_linear_attention(LlmConfig(linear_attention="triton"), [paged])


def test_guesses_are_made_when_they_are_asked_for() -> None:
    assert make_drafter(LlmConfig()) is None
    drafter = make_drafter(LlmConfig(speculative="ngram", speculative_tokens=3))
    assert drafter is not None
    assert isinstance(drafter._make_proposer(), NgramProposer)
    drafter = make_drafter(LlmConfig(speculative="mtp"))
    assert drafter is not None
    assert (drafter._num_tokens, drafter._asks_runner) == (3, True)
    assert not has_overlap(LlmConfig(speculative="mtp"), torch.device("cuda"))
