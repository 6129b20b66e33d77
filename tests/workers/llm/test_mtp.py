"""Qwen3.5's own head guesses the next tokens: by the formula, and without a change of any text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.wire.packing import unpack_int32
from pipeline.wire.sampling import GrammarKind
from tests.chats import ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CPU, NUM_TOKENS, Rig
from tests.grammars import grammar_of
from tests.mtp import MtpReference
from tests.pictures import noise
from tests.reference import Reference
from tests.workers.llm.test_grammars import FREE, Runs
from tests.workers.llm.test_speculation import (
    WANTED,
    Told,
    assert_go_on,
    assert_same,
    finish,
    submit,
    submit_again,
    with_,
)
from tools.random_checkpoint.agreeing import make_agree
from tools.random_checkpoint.make import make_checkpoint as make_hub_checkpoint
from workers.llm.model_runner import ModelRunner
from workers.llm.models.registry import decoder_of
from workers.llm.mtp_runner import MtpRunner
from workers.llm.parallel import TensorParallel
from workers.llm.speculation.drafter import Drafter
from workers.llm.speculation.told import ToldProposer

KINDS = ("qwen3_5", "qwen3_5_moe")
CHAT: ChatTurns = [("user", ["What is it? " * 9, noise(1, (160, 160)), "Say it in a few words."])]
Expected = dict[tuple[str, int], Told]


@pytest.fixture(scope="module", params=KINDS)
def random_head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is never right."""
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is mostly right."""
    return make_agree(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param), 0.02)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Expected:
    rig = Rig(folder, 512, block_size=4)
    for name, params in WANTED.items():
        submit(rig, name, params)
    return finish(rig)


class Pair(NamedTuple):
    """All [hidden]."""

    embedded: Tensor
    hidden: Tensor
    out: Tensor


class Recorded:
    """What the head computes for one sequence, by the place of the pair, as it was computed last."""

    def __init__(self, runner: MtpRunner) -> None:
        self.pairs: dict[int, Pair] = {}
        self._run = runner._run
        setattr(runner, "_run", self.run)  # noqa: B010

    def run(self, x: Tensor, hidden: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        out = self._run(x, hidden, spans)
        ((_, place, count),) = spans
        self.pairs |= zip(range(place, place + count), map(Pair, x, hidden, out), strict=True)
        return out


@torch.inference_mode()
def reference_inputs(folder: Path, tokens: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs of the text, by transformers' decoder: the second tokens embedded, the hidden states of
    the first ones, and their positions [3, num_pairs]."""
    reference = Reference(folder)
    inputs = reference.inputs(CHAT)
    text = torch.cat((inputs["input_ids"], torch.tensor([tokens])), dim=1)
    found: dict[str, Any] = {}

    def keep(module: object, args: object, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)

    model = reference.model.model
    types = torch.cat((inputs["mm_token_type_ids"], torch.zeros(1, len(tokens), dtype=torch.int64)), dim=1)
    hook = model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    out = model(
        input_ids=text, attention_mask=torch.ones_like(text), mm_token_type_ids=types, use_cache=False,
        **pictures,
    )  # fmt: skip
    hook.remove()
    embedded, positions = found["inputs_embeds"][0], found["position_ids"][-3:, 0]
    hidden = out.last_hidden_state[0]
    return embedded[1:], hidden[:-1], positions[:, :-1]


@pytest.mark.parametrize("attention", ["torch", "native"])
@pytest.mark.parametrize("budget", [512, 64, 9])
def test_the_head_computes_its_formula_through_every_cut(
    budget: int, attention: str, random_head: Path
) -> None:
    rig = Rig(random_head, budget, 4, attention=attention, speculative="mtp")
    rig.open_pool()
    runner: Any = rig.engine.stepper.runner
    recorded = Recorded(runner._mtp)
    request, ready = rig.request(CHAT, "r")
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(embedding, rig.now)
    rig.run()
    tokens = rig.tokens("r")
    num_pairs = len(unpack_int32(request.prompt_token_ids)) + NUM_TOKENS - 1
    found = Pair(*map(torch.stack, zip(*(recorded.pairs[place] for place in range(num_pairs)), strict=True)))
    embedded, hidden, positions = reference_inputs(random_head, tokens)
    # What the layers before it have rounded is not the head's.
    torch.testing.assert_close(found.embedded, embedded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-3, atol=1e-3)
    formula = MtpReference(random_head)
    wanted = formula.logits(formula.hidden(found.embedded, found.hidden, positions))
    assert float(wanted.std()) > 0.5
    torch.testing.assert_close(formula.logits(found.out), wanted, rtol=1e-4, atol=1e-4)
    assert rig.scheduler.drafter is not None
    assert rig.scheduler.drafter.counters["spec_decode_num_drafts"] > 3


def test_each_guess_is_made_from_the_one_before(random_head: Path) -> None:
    """By the formula, from the head's own hidden states."""
    rig = Rig(random_head, 512, 4, speculative="mtp")
    submit(rig, "greedy", with_(WANTED["greedy"], max_tokens=9))
    runner: Any = rig.engine.stepper.runner
    (request,) = (choices.all[0] for choices in rig.engine.requests.values())
    rig.engine.step(0.0)
    drafter = rig.scheduler.drafter
    assert drafter is not None
    proposer = drafter._drafted[request.key].proposer
    assert isinstance(proposer, ToldProposer)
    known = [*request.prompt_token_ids, *request.output_token_ids]
    proposer.extend(known)
    guesses = list(proposer.propose(3))
    assert len(guesses) == 3
    reference, formula = Reference(random_head), MtpReference(random_head)
    with torch.inference_mode():
        text = torch.tensor([known])
        hidden = reference.model.model.language_model(
            inputs_embeds=reference.model.get_input_embeddings()(text)
        ).last_hidden_state[0, :-1]
        for number in range(3):
            embedded = reference.model.get_input_embeddings()(torch.tensor([*known, *guesses[:number]])[1:])
            positions = torch.arange(len(hidden)).expand(3, -1)
            made = formula.hidden(embedded, hidden, positions)
            assert int(formula.logits(made)[-1].argmax()) == guesses[number]
            hidden = torch.cat((hidden, made[-1:]))
    runner.close()


@pytest.mark.parametrize("folder", KINDS[:1], indirect=True)
@pytest.mark.parametrize(
    ("budget", "num_blocks", "num_snapshots"),
    [(512, 600, 0), (512, 600, 9), (11, 600, 0), (512, 70, 9), (20, 60, 0)],
    ids=["free", "prefixes", "chunks", "little memory, prefixes", "chunks in less memory"],
)
def test_every_kind_of_sampling_gives_the_same(
    budget: int, num_blocks: int, num_snapshots: int, folder: Path, expected: Expected
) -> None:
    rig = Rig(
        folder, budget, 4, num_blocks=num_blocks, num_snapshots=num_snapshots, speculative="mtp"
    )  # fmt: skip
    drafter = rig.scheduler.drafter = Drafter(ToldProposer, 3, max_rows=40, asks_runner=True)
    for name, params in WANTED.items():
        submit(rig, name, params)
    assert_same(finish(rig), expected)
    counters = drafter.counters
    # What is drawn is rarely what is most likely; and small steps have little room for guesses.
    assert counters["spec_decode_num_accepted_tokens"] > (30 if budget > 100 else 8)
    assert counters["spec_decode_num_draft_tokens"] > counters["spec_decode_num_accepted_tokens"]
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100)
    assert not drafter._drafted
    rig.scheduler.cache.check_empty()


def test_the_next_attempt_goes_on_with_guesses(folder: Path, expected: Expected) -> None:
    rig = Rig(folder, 30, block_size=4, speculative="mtp")
    submit_again(rig, expected)
    assert_go_on(finish(rig), expected)
    assert rig.scheduler.drafter is not None
    assert rig.scheduler.drafter.counters["spec_decode_num_accepted_tokens"] > 20


def test_good_guesses_save_steps(folder: Path) -> None:
    told = []
    for speculative in ("none", "mtp"):
        rig = Rig(folder, 512, speculative=speculative)
        submit(rig, "greedy", with_(WANTED["greedy"], max_tokens=100))
        told.append(finish(rig))
    assert_same(told[1], told[0])
    assert rig.engine.counters["steps"] < 60
    assert rig.engine.counters["generation_tokens"] == 100


def test_a_prefix_from_the_cache_gives_the_same(folder: Path) -> None:
    """The pairs of its blocks are another request's, the last one of them maybe nobody's."""
    answers = []
    for speculative, num_snapshots in (("none", 0), ("mtp", 6)):
        rig = Rig(folder, 512, speculative=speculative, num_snapshots=num_snapshots)
        for name in ("first", "second"):
            submit(rig, name, WANTED["greedy"], context=200)
            told = finish(rig)
        answers.append(told)
    assert_same(answers[1], answers[0])
    assert rig.engine.counters["prefix_cache_hits"] == 192
    assert rig.scheduler.drafter is not None
    assert rig.scheduler.drafter.counters["spec_decode_num_accepted_tokens"] > 30


@pytest.mark.parametrize("num_blocks", [100, 22])
def test_grammars_on_two_ranks(num_blocks: int, folder: Path) -> None:
    """Both make the same guesses, of which those are verified that the grammar allows."""
    runs = Runs(folder)
    free = msgspec.structs.replace(FREE, max_tokens=40)
    form = grammar_of(GrammarKind.REGEX, "[ab]{5}(-[0-9]{3}){4}")
    wanted = {
        "ruled": msgspec.structs.replace(free, grammar=grammar_of(GrammarKind.REGEX, r"[^\n]*")),
        "free": free,
        "ruled too": msgspec.structs.replace(free, temperature=1.0, ignore_eos=False, grammar=form),
    }
    plain = runs.answers(wanted, has_overlap=False)
    drafter = Drafter(ToldProposer, 3, max_rows=40, asks_runner=True)
    rig = runs.rig(512, num_blocks, has_overlap=False, speculative="mtp", drafter=drafter)
    for name, params in wanted.items():
        runs.submit(rig, name, params)
    assert runs.finish(rig) == plain
    assert drafter.counters["spec_decode_num_accepted_tokens"] > 5
    assert torch.equal(rig.runner._last_tokens, rig.other._last_tokens)
    assert bool(rig.scheduler.num_preemptions) == (num_blocks < 100)


@pytest.mark.interpreter
def test_the_way_of_a_gpu_gives_the_same(tmp_path: Path) -> None:
    """Steps without drafts run as graphs, and their tokens are guessed behind, too."""
    folder, told = make_agree(make_checkpoint(tmp_path, "qwen3_5"), 0.02), []
    wanted = {name: with_(WANTED[name], max_tokens=5, n=1) for name in ("greedy", "drawn")}
    for speculative, attention in (("none", "torch"), ("mtp", "triton")):
        rig = Rig(folder, 512, attention=attention, speculative=speculative)
        for name, params in wanted.items():
            submit(rig, name, params)
        told.append({key: one.tokens for key, one in finish(rig).items()})
    assert told[0] == told[1]
    assert rig.scheduler.drafter is not None
    assert rig.scheduler.drafter.counters["spec_decode_num_accepted_tokens"] > 0


def load(folder: Path) -> None:
    config = Config(model=ModelConfig(dtype="float32"), llm=LlmConfig(speculative="mtp"))
    info = read_model_info(folder)
    runner = ModelRunner.load(info, config, folder, CPU, TensorParallel(), lambda done, total: None)
    runner.open_cache(10, 100)


def test_a_checkpoint_of_the_hubs_layout_has_a_head(tmp_path: Path) -> None:
    make_hub_checkpoint(tmp_path / "whole", "qwen3.5-tiny")
    load(tmp_path / "whole")


def test_a_model_without_a_head_is_refused(tmp_path: Path, random_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the head that the checkpoint lacks: it has no mtp\.fc"):
        load(random_checkpoint)
    info = read_model_info(random_checkpoint).text
    with pytest.raises(ValueError, match="'mtp' is not for this model: its family has no head"):
        decoder_of(read_model_info(random_checkpoint)).mtp_spec_of(info, 1)


@pytest.mark.parametrize("count", [0, 2])
def test_a_head_of_another_number_of_layers_is_refused(count: int, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_5")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = count
    (folder / "config.json").write_text(json.dumps(config))
    info = read_model_info(folder)
    with pytest.raises(ValueError, match=f"this checkpoint has mtp_num_hidden_layers = {count}"):
        decoder_of(info).mtp_spec_of(info.text, 1)
