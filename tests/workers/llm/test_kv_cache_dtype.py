"""Keys and values in 8 bits: tokens depend neither on the backend, nor on how prompts are cut, nor on what is
cached or guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.config import LlmConfig
from pipeline.wire.clients import ChoiceProgress
from pipeline.wire.generation import GenerateRequest
from pipeline.wire.packing import pack_int32, unpack_int32
from pipeline.wire.sampling import SamplingParams
from tests.chats import CHATS, ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CLIENT, CPU, Rig
from tests.fakes import PREPROCESS
from tests.workers.llm.test_speculation import WANTED, assert_same, finish, submit, with_
from tools.quantization_loss import kv_loss, logits_of
from tools.random_checkpoint.agreeing import make_agree
from workers.llm.attention.triton import TritonAttention
from workers.llm.cache.kv_formats import FP8, INT8, KvFormat
from workers.llm.start import check_kv_cache

CHAT = CHATS["pictures in two turns"]
LONG = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, seed=1)
SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, seed=1)


def ask(rig: Rig, request_id: str, chat: ChatTurns = CHAT, **options: object) -> list[int]:
    request, ready = rig.request(chat, request_id, **options)
    rig.engine.handle(request, rig.now)
    for embedding in ready:
        rig.engine.handle(embedding, rig.now)
    rig.run()
    return rig.tokens(request_id)


def opened(budget: int, name: str, attention: str, **options: object) -> Rig:
    rig = Rig(EMBEDDED / "model", budget, 4, attention=attention, kv_cache_dtype=name, **options)  # type: ignore[arg-type]
    rig.open_pool()
    return rig


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_tokens_are_those_of_torchs_operators(name: str) -> None:
    """In one step and in small ones, and again behind a cached prefix."""
    expected = ask(opened(512, name, "torch"), "r")
    assert len(set(expected)) > 3
    rig = opened(9, name, "native")
    assert ask(rig, "r") == expected
    num_cached = rig.scheduler.cache.blocks.num_cached
    assert num_cached > 10
    assert ask(rig, "again") == expected
    runner = rig.engine.stepper.runner
    assert {tensor.itemsize for tensor in runner.attention.cache.tensors} == {1}  # type: ignore[attr-defined]


@pytest.mark.interpreter
def test_the_way_of_a_gpu_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, and decode batches as CUDA graphs have them, in the interpreter. It compiles nothing
    that would have to be warm."""
    monkeypatch.setattr(TritonAttention, "warm_up", lambda self, layers: None)
    chat = CHATS["text only"]
    expected = ask(opened(512, "int8", "native"), "r", chat, sampling=SHORT)
    assert ask(opened(512, "int8", "triton", has_overlap=True), "r", chat, sampling=SHORT) == expected


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers with states beside such with keys, and a head that guesses mostly right."""
    return make_agree(make_checkpoint(tmp_path_factory.mktemp("qwen3_5"), "qwen3_5"), 0.02)


def test_guesses_of_a_head_change_nothing(hybrid: Path) -> None:
    """Its own keys and values are in 8 bits, too."""
    wanted = with_(WANTED["greedy"], max_tokens=40)
    plain = Rig(hybrid, 512, 4, kv_cache_dtype="int8")
    guessing = Rig(hybrid, 64, 4, kv_cache_dtype="int8", attention="native", speculative="mtp")
    for rig in (plain, guessing):
        submit(rig, "greedy", wanted)
    assert_same(finish(guessing), finish(plain))
    assert guessing.scheduler.drafter is not None
    assert guessing.scheduler.drafter.counters["spec_decode_num_accepted_tokens"] > 10


def begin(rig: Rig, number: int, earlier: Mapping[str, list[int]] | None = None) -> str:
    """A prompt of its own length; in a later attempt, with tokens that the client has already."""
    name = str(number)
    prompt = [300 + (11 * number + 7 * step) % 97 for step in range(10 + 9 * number)]
    so_far = () if earlier is None else (ChoiceProgress(pack_int32(earlier[name])),)
    request = GenerateRequest(
        sender=PREPROCESS, epoch=1, client_id=CLIENT, request_id=name, attempt=1 + bool(so_far),
        arrival=number + 1, prompt_token_ids=pack_int32(prompt), position_delta=0, items=(), sampling=LONG,
        positions=pack_int32([*range(len(prompt))] * 3), choices=so_far,
    )  # fmt: skip
    rig.engine.handle(request, rig.now)
    return name


def told(rig: Rig) -> dict[str, list[int]]:
    rig.run()
    found: dict[str, list[int]] = {}
    for output in rig.outputs():
        found.setdefault(output.request_id, []).extend(unpack_int32(output.new_token_ids).tolist())
    return found


@pytest.mark.parametrize("attention", ["torch", "native"])
def test_what_was_computed_before_goes_on_with_the_same_tokens(attention: str) -> None:
    """Its keys and values were written token by token, and are written anew in chunks: behind a preemption,
    and in a successor's cache behind a death."""
    options = {"kv_cache_dtype": "int8", "attention": attention}
    roomy, narrow = (Rig(EMBEDDED / "model", 64, 4, num_blocks=blocks, **options) for blocks in (600, 40))  # type: ignore[arg-type]
    for rig in (roomy, narrow):
        for number in range(4):
            begin(rig, number)
    expected = told(roomy)
    assert len({tuple(tokens) for tokens in expected.values()}) == 4
    assert roomy.scheduler.num_preemptions == 0
    assert told(narrow) == expected
    assert narrow.scheduler.num_preemptions > 0
    successor = Rig(EMBEDDED / "model", 64, 4, **options)  # type: ignore[arg-type]
    earlier = {name: tokens[: 1 + 8 * int(name)] for name, tokens in expected.items()}
    for number in range(4):
        begin(successor, number, earlier)
    assert told(successor) == {name: tokens[len(earlier[name]) :] for name, tokens in expected.items()}


def test_what_has_no_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype 'int8' goes with attention .* 'flash3' reads"):
        LlmConfig(kv_cache_dtype="int8", attention="flash3")
    gpu, config = torch.device("cuda"), LlmConfig(kv_cache_dtype="fp8")
    with pytest.raises(ValueError, match="kv_cache_dtype 'fp8' on a GPU is for models in 16 bits"):
        check_kv_cache(config, gpu, torch.float32)
    check_kv_cache(config, gpu, torch.bfloat16)
    check_kv_cache(config, CPU, torch.float32)


@pytest.mark.parametrize(("kv_format", "bound"), [(INT8, 2e-4), (FP8, 5e-3)])
def test_the_loss_that_is_told_is_in_the_documentation(kv_format: KvFormat, bound: float) -> None:
    """And about as large as it is."""
    page = (Path(__file__).parents[3] / "docs/quantization.md").read_text().partition("## Keys and values")[2]
    told = f"| {kv_format.name} | "
    assert kv_format.loss.split()[3] in next(line for line in page.splitlines() if line.startswith(told))
    token_ids = torch.arange(300, 364)
    exact, lossy = (
        logits_of(EMBEDDED / "model", torch.float32, "none", token_ids, name).found
        for name in ("auto", kv_format.name)
    )
    assert 0 < kv_loss(lossy, exact).kl < bound
