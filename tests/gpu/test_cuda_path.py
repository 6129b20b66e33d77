"""What only a GPU can show: kernels compiled, graphs captured, pools mapped by another process.

`tools/gpu_check.py` runs these.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from pipeline.config import Config, LlmConfig, ModelConfig
from pipeline.families import read_model_info
from pipeline.transport.memory import CudaBindings
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.tensors import PoolMap, TensorPool
from pipeline.wire.base import GridTHW
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep, StepPlan
from tests.chats import CHATS, NUM_TOKENS, to_messages
from tests.chats import generate as ask
from tests.fakes import LLM_0
from tests.reference import Reference, assert_same_tokens
from tests.servers import Server
from tests.workers.llm.attention.kv_bits import BOUNDS, check_errors, check_poison, check_roundings
from tests.workers.llm.attention.spans import make_layer, make_spans, reference
from tests.workers.llm.sampling.test_kernel import OPTIONS, draw
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged
from workers.llm.model_runner import ModelRunner
from workers.llm.models.qwen2 import Qwen2Decoder
from workers.llm.parallel import TensorParallel
from workers.nn.layers import rotary_tables, rotate
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.registry import open_weights
from workers.vit.engines.torch import TorchEngine
from workers.vit.models.base import EncodeJob
from workers.vit.models.qwen2_vl import VisionEncoder

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
CUDA = torch.device("cuda:0")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (6, 1), (12, 2), (28, 4), (64, 8)])
@pytest.mark.parametrize("seed", range(3))
def test_attention_of_random_steps(num_heads: int, num_kv_heads: int, dtype: torch.dtype, seed: int) -> None:
    from workers.llm.attention.triton import TritonAttention

    rng = random.Random(seed)
    torch.manual_seed(seed)
    block_size = rng.choice([16, 64])
    decodes = [(1, rng.choice([0, 1, 63, 64, 65, 2000])) for _ in range(rng.randint(0, 5))]
    prefills = [
        (rng.choice([2, 64, 129, 700]), rng.choice([0, 1, 130])) for _ in range(rng.randint(not decodes, 2))
    ]
    num_blocks = 16_000 // block_size
    cache = PagedTensors([Paged(num_kv_heads, 128)], num_blocks, block_size, dtype, CUDA)
    cache.tensors[0].fill_(float("nan"))
    attention = TritonAttention(cache)
    spans = make_spans(rng, block_size, num_blocks, decodes + prefills)
    for span in spans:
        slots = [
            span.block_table[position // block_size] * block_size + position % block_size
            for position in range(span.num_computed)
        ]
        cache.tensors[0][slots] = torch.randn(len(slots), 2 * num_kv_heads, 128, device=CUDA).to(dtype)
    num_tokens = sum(span.num_tokens for span in spans)
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, 128, device=CUDA).to(dtype)
    bias, angles = (
        torch.randn(qkv[0].numel(), device=CUDA).to(dtype),
        50 * torch.randn(num_tokens, 64, device=CUDA),
    )
    turned = rotate(qkv.float() + bias.float().view(qkv.shape[1:]), *rotary_tables(angles, torch.float32))
    layer, step = make_layer(0, num_heads, num_kv_heads, 128, bias), attention.plan(spans)
    step.write(layer, qkv, step.rotary(angles, dtype))
    out = step.attend(layer, qkv)
    assert error(qkv[:, :num_heads], turned[:, :num_heads]) < TOLERANCE[dtype]
    assert error(out, reference(cache.tensors[0], block_size, spans, qkv[:, :num_heads])) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", BOUNDS)
def test_keys_and_values_in_8_bits(name: str, dim: int, dtype: torch.dtype) -> None:
    from workers.llm.attention.triton import TritonAttention

    assert 0 < check_errors(TritonAttention, name, dtype, dim, device=CUDA) < 1.1 * BOUNDS[name]
    check_roundings(TritonAttention, name, CUDA)
    check_poison(TritonAttention, name, CUDA)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_sampling_kernel_draws_what_the_sampler_draws(options: dict[str, Any]) -> None:
    from workers.llm.sampling.kernel import sample

    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 151_936)
    assert draw(logits, options, sample, device=CUDA) == draw(logits, options, None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_torch_draws_on_the_gpu_what_it_draws_on_the_cpu(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(64, 151_936)
    assert draw(logits, options, None, device=CUDA) == draw(logits, options, None)


def make_runner(folder: Path, **options: Any) -> ModelRunner:
    config = Config(model=ModelConfig(dtype="float32"), llm=LlmConfig(max_num_seqs=8, **options))
    runner = ModelRunner.load(
        read_model_info(folder), config, folder, CUDA, TensorParallel(), lambda done, total: None
    )
    runner.open_cache(100, 1000)
    return runner


def make_start(slot: int, prompt: list[int], sampling: SamplingParams) -> SequenceStart:
    """With ten blocks of its own."""
    table = pack_int32(range(slot * 10, slot * 10 + 10))
    return SequenceStart(slot, len(prompt), sampling, pack_int32(prompt), block_table=table)


def make_plan(step: int, sequences: tuple[SequenceStep, ...], starts: tuple[SequenceStart, ...]) -> StepPlan:
    return StepPlan(sender=LLM_0, epoch=1, step=step, started=starts, sequences=sequences)


def generate(
    runner: ModelRunner, prompts: list[list[int]], num_tokens: int, is_ahead: bool
) -> list[list[int]]:
    """Greedy tokens of all prompts side by side; `is_ahead`: the next step is launched before the last one's
    result is taken."""
    greedy = SamplingParams(temperature=0, seed=1)
    starts = tuple(make_start(slot, prompt, greedy) for slot, prompt in enumerate(prompts))
    launched, tokens = [], [[] for _ in prompts]  # type: ignore[var-annotated]
    for step in range(num_tokens):
        sequences = tuple(
            SequenceStep(slot, 1 if step else len(prompt)) for slot, prompt in enumerate(prompts)
        )
        launched.append(runner.launch(make_plan(step, sequences, () if step else starts)))
        while len(launched) > int(is_ahead):
            for of_slot, token in zip(tokens, launched.pop(0).result().token_ids, strict=True):
                of_slot.extend(token)
    for rest in launched:
        for of_slot, token in zip(tokens, rest.result().token_ids, strict=True):
            of_slot.extend(token)
    return tokens


@pytest.mark.parametrize("count", [1, 3, 8])
def test_graphs_kernels_and_torch_agree(count: int, random_checkpoint: Path) -> None:
    rng = random.Random(count)
    prompts = [[rng.randrange(5, 4000) for _ in range(rng.randint(3, 90))] for _ in range(count)]
    expected = generate(make_runner(random_checkpoint, attention="torch"), prompts, 30, is_ahead=False)
    for options in ({"cuda_graphs": False}, {"cuda_graphs": True}):
        runner = make_runner(random_checkpoint, attention="triton", **options)
        for is_ahead in (False, True):
            assert generate(runner, prompts, 30, is_ahead) == expected, f"{options}, ahead: {is_ahead}"


def test_tied_weights_are_in_memory_once(random_checkpoint: Path) -> None:
    decoder = make_runner(random_checkpoint).decoder
    assert isinstance(decoder, Qwen2Decoder)
    assert decoder.info.tie_word_embeddings
    head, table = decoder.vocabulary.head, decoder.vocabulary.table
    assert isinstance(head, TorchLinear)
    assert isinstance(table, torch.Tensor)
    assert head.weight.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


@pytest.mark.filterwarnings("ignore:.*prototype feature")  # torch says so of the mode itself
@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_step_waits_for_nothing(has_graphs: bool, random_checkpoint: Path) -> None:
    """torch raises where an operation would wait for the GPU."""
    runner = make_runner(random_checkpoint, attention="triton", cuda_graphs=has_graphs)
    wishes = [
        SamplingParams(temperature=0, seed=1), SamplingParams(seed=2, top_p=0.9, top_k=50),
        SamplingParams(seed=3, logprobs=3, logit_bias={5: 1.0}),
        SamplingParams(seed=4, repetition_penalty=1.2, presence_penalty=0.5, min_tokens=9),
    ]  # fmt: skip
    prompt = list(range(10, 50))

    def plan(step: int) -> StepPlan:
        sequences = tuple(SequenceStep(slot, 1 if step else len(prompt)) for slot in range(len(wishes)))
        starts = tuple(make_start(slot, prompt, sampling) for slot, sampling in enumerate(wishes))
        return make_plan(step, sequences, () if step else starts)

    for step in range(3):  # compiles, and makes the tables of penalties
        runner.launch(plan(step)).result()
    try:
        torch.cuda.set_sync_debug_mode("error")
        launched = [runner.launch(plan(step)) for step in (0, 1, 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(one.result().token_ids) for one in launched] == [4, 4, 4]


EXPORTER = """
import sys, msgspec, torch
from pipeline.transport.slots import SlotAllocator
from pipeline.transport.memory import CudaBindings
from pipeline.transport.tensors import TensorPool
slots = SlotAllocator(64 << 20, 1 << 24, 8)
pool = TensorPool.on_cuda("vit.0", 1, 64 << 20, 8, 0, CudaBindings())
handle = pool.lend(slots.allocate(1 << 24), (1024, 3584), "bfloat16")
pool.tensor(handle).copy_(torch.arange(1024, device="cuda")[:, None].expand(-1, 3584))
torch.cuda.synchronize()
print(msgspec.msgpack.encode([pool.info, handle]).hex(), flush=True)
sys.stdin.read()
"""


def test_embeddings_of_another_process_never_pass_through_the_host() -> None:
    from pipeline.wire.handles import PoolInfo, TensorHandle

    with subprocess.Popen(
        [sys.executable, "-c", EXPORTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as exporter:
        assert exporter.stdout is not None
        assert exporter.stdin is not None
        info, handle = msgspec.msgpack.decode(
            bytes.fromhex(exporter.stdout.readline()), type=tuple[PoolInfo, TensorHandle]
        )
        pools = PoolMap(0)
        pools.open(info)
        x = torch.zeros(2000, 3584, dtype=torch.bfloat16, device=CUDA)
        pools.copy_rows(x[:8], handle, 0)
        torch.cuda.synchronize()
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            pools.copy_rows(x[100:500], handle, 300)
            torch.cuda.synchronize()
        copies = [
            event.name
            for event in profile.events()
            if "memcpy" in event.name.lower() and event.device_type.name == "CUDA"
        ]
        assert [name for name in copies if "HtoD" in name or "DtoH" in name] == []
        assert any("DtoD" in name or "PtoP" in name for name in copies), copies
        assert x[100:500, 7].tolist() == torch.arange(300, 700).to(torch.bfloat16).tolist()
        assert not bool(x[500:].any())
        pools.close(info.pool_id)
        exporter.stdin.close()


def test_a_pool_is_never_mapped_by_its_owner() -> None:
    """It is an error of the driver's, and must be one of ours."""
    from pipeline.wire.errors import PipelineError

    pool, _ = (
        TensorPool.on_cuda("vit.0", 1, 4 << 20, 8, 0, CudaBindings()),
        SlotAllocator(4 << 20, 1 << 16, 8),
    )
    with pytest.raises(PipelineError, match="cudaIpcOpenMemHandle"):
        PoolMap(0).open(pool.info)
    pool.close()


@pytest.mark.parametrize(
    "options",
    [
        ("--embedding-transport", "cuda_ipc"),
        ("--no-cuda-graphs", "--overlap", "off"),
        ("--embedding-transport", "host"),
    ],
)
def test_the_whole_pipeline_gives_the_tokens_of_hugging_face(
    options: tuple[str, ...], random_checkpoint: Path
) -> None:
    from pipeline.client.client import PipelineClient

    reference_model = Reference(random_checkpoint)

    async def run(server: Server) -> None:
        async with PipelineClient(server.run_dir) as client:
            for name, chat in CHATS.items():
                tokens, _ = await ask(client, *to_messages(chat))
                assert_same_tokens(tokens, reference_model.answer(chat, NUM_TOKENS), name)

    with Server(
        "--model",
        str(random_checkpoint),
        "--device",
        "cuda",
        "--dtype",
        "float32",
        "--kv-cache-gib",
        "1",
        *options,
    ) as server:
        asyncio.run(run(server))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_encoder_packs_pictures_of_any_sizes(dtype: torch.dtype, random_checkpoint: Path) -> None:
    info = read_model_info(random_checkpoint).vision
    generator, jobs = torch.Generator().manual_seed(0), []
    for grid in (GridTHW(1, 4, 6), GridTHW(3, 8, 4), GridTHW(1, 30, 16), GridTHW(1, 2, 2)):
        pixels = torch.randint(
            0, 256, (2 * grid.t, grid.h * 14, grid.w * 14, 3), dtype=torch.uint8, generator=generator
        )
        jobs.append((pixels, grid))
    outputs = []
    for device, of_type in ((torch.device("cpu"), torch.float32), (CUDA, dtype)):
        engine = TorchEngine(VisionEncoder(info, open_weights(random_checkpoint, of_type, device)))
        made = []
        for pixels, grid in jobs:
            output = torch.empty(info.num_tokens(grid), info.embedding_width, dtype=of_type, device=device)
            made.append(EncodeJob(pixels, grid, output))
        engine.encode(made)
        outputs.append([job.output.cpu() for job in made])
    for ours, expected in zip(outputs[1], outputs[0], strict=True):
        assert error(ours, expected) < (1e-4 if dtype == torch.float32 else 2e-2)
