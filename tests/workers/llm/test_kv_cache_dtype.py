"""Keys and values in 8 bits: tokens depend neither on the backend, nor on how prompts are cut, nor on what is
cached or guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from pipeline.config import LlmConfig
from pipeline.wire.sampling import SamplingParams
from tests.chats import CHATS, ChatTurns
from tests.checkpoints import make_checkpoint
from tests.engine_rig import CPU, Rig
from tests.workers.llm.test_speculation import WANTED, assert_same, finish, submit, with_
from tools.quantization_loss import kv_loss, logits_of
from tools.random_checkpoint.agreeing import make_agree
from workers.llm.attention.triton import TritonAttention
from workers.llm.cache.kv_formats import FP8, INT8, KvFormat
from workers.llm.start import check_kv_cache

CHAT = CHATS["pictures in two turns"]
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
