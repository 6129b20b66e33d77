"""The parts of `tools.gpu_check`: each yields its rows as they are known."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import torch

from launcher.checkpoints import EMBEDDED
from tools.bench_engine import Served, serve
from tools.bench_serving import Workload, open_session, run_load, send, summarize
from tools.bench_towers import Bench
from tools.random_checkpoint import make_checkpoint
from tools.runners import (
    BLOCK,
    CONTEXT,
    decode_seconds,
    kv_bytes,
    num_weights,
    open_runner,
    prefill_flops,
    prefill_seconds,
)
from workers.llm.attention.base import AttentionLayer, SequencePart
from workers.llm.backends import choose_backend
from workers.llm.cache.paged_tensors import PagedTensors
from workers.llm.cache.spec import Paged
from workers.llm.model_runner import ModelRunner
from workers.nn.weights.base import Experts
from workers.nn.weights.dense import TorchLinear
from workers.nn.weights.experts import ListedExperts, StackedExperts

NUM_PROMPTS = 8  # whose errors are taken together: one alone may be ten times another's
GPU_TESTS = ("tests/gpu", "tests/pipeline/transport/test_tensors.py")


class Row(NamedTuple):
    """A line of the table.

    `share`: the figure as a part or a multiple of `against`; `wanted`: the least it is to be, or with a minus
    the most.
    """

    what: str
    value: str
    share: float | None = None
    wanted: float | None = None
    against: str = ""

    @property
    def verdict(self) -> str:
        if self.share is None or self.wanted is None:
            return ""
        return (
            "met"
            if (self.share >= self.wanted if self.wanted > 0 else self.share <= -self.wanted)
            else "missed"
        )


class Machine:
    """What parts share: the device, a folder for checkpoints, the rates that an earlier part measured."""

    def __init__(self, folder: Path, rates: dict[str, float], device: torch.device, is_small: bool) -> None:
        self.folder, self.rates, self.device, self.is_small = folder, rates, device, is_small
        self.shapes = ("tiny", "qwen3-vl-tiny") if is_small else ("2b", "qwen3-vl-2b", "7b")
        self.large = "tiny" if is_small else "7b"

    def checkpoint(self, shape: str) -> Path:
        if shape == "embedded":
            return EMBEDDED / "model"
        folder = self.folder / shape
        if not (folder / "tokenizer.json").exists():
            folder.mkdir(exist_ok=True)
            make_checkpoint(folder, shape, self.device)
        return folder

    def seconds(self, run: Callable[[], object], repeats: int = 20, warm_ups: int = 3) -> float:
        """Median time of a call, by events on a GPU."""
        for _ in range(warm_ups):
            run()
        if self.device.type != "cuda":
            return statistics.median([_timed(run) for _ in range(repeats)])
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start, stop in events:
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median([float(start.elapsed_time(stop)) / 1000 for start, stop in events])


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# Parts.


def environment(machine: Machine) -> Iterator[Row]:
    yield Row("python, system", f"{platform.python_version()}, {platform.platform()}")
    yield Row("date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))
    for name in ("torch", "triton", "transformers", "cuda-bindings", "pyzmq", "msgspec"):
        try:
            yield Row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "not installed")
    yield Row(
        "FlashAttention-3",
        "installed" if importlib.util.find_spec("flash_attn_interface") else "not installed",
    )
    yield Row("MPS", shutil.which("nvidia-cuda-mps-control") or "not installed")
    if shutil.which("nvidia-smi"):
        query = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version,compute_mode,mig.mode.current",
            "--format=csv,noheader",
        ]
        yield from [
            Row("GPU", line)
            for line in subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        ]
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    yield Row(
        "peer access",
        ", ".join(f"{a}→{b}: {torch.cuda.can_device_access_peer(a, b)}" for a, b in pairs) or f"{count} GPU",
    )


def checkpoints(machine: Machine) -> Iterator[Row]:
    """Made once; the parts behind it find them."""
    for shape in machine.shapes:
        seconds = _timed(functools.partial(machine.checkpoint, shape))
        yield Row(f"random checkpoint, {shape}", f"{seconds:.1f} s")


def rates(machine: Machine) -> Iterator[Row]:
    elements, size = (1 << 20, 256) if machine.is_small else (1 << 30, 8192)
    source = torch.randn(elements, device=machine.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / machine.seconds(lambda: target.copy_(source))
    a, b = (torch.randn(size, size, device=machine.device).to(torch.bfloat16) for _ in range(2))
    matmul = 2 * size**3 / machine.seconds(lambda: a @ b)
    machine.rates |= {"copy": copy, "matmul": matmul}
    yield Row("copy", f"{copy / 1e9:.0f} GB/s")
    yield Row(f"matmul, bf16, {size}³", f"{matmul / 1e12:.1f} TFLOP/s")


def tests(machine: Machine) -> Iterator[Row]:
    """Told one by one, so that what has passed is known however this ends.

    Without the project's settings, which need more packages.
    """
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        ".",
        "-m",
        "gpu",
        "-v",
        "--tb=line",
        "-p",
        "no:cacheprovider",
    ]
    num_passed = num_failed = 0
    with subprocess.Popen(
        [*command, *GPU_TESTS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            num_passed += " PASSED" in line
            if " FAILED" in line or " ERROR" in line or line.startswith(("E  ", "/", "ERROR")):
                num_failed += " FAILED" in line or "ERROR" in line
                yield Row("failed", line.strip()[:300])
            elif " PASSED" in line and num_passed % 20 == 0:
                yield Row("so far", f"{num_passed} passed, {num_failed} failed")
    yield Row(
        "tests marked gpu",
        f"{num_passed} passed, {num_failed} failed",
        float(process.returncode == 0 and num_passed > 0),
        1.0,
        "all pass",
    )


def attention(machine: Machine) -> Iterator[Row]:
    names = ["triton" if machine.device.type == "cuda" else "torch"]
    if importlib.util.find_spec("flash_attn_interface"):
        names.append("flash3")
    for batch, context in (
        ((2, 64),)
        if machine.is_small
        else ((1, 1024), (1, 8192), (32, 1024), (32, 8192), (256, 1024), (256, 8192))
    ):
        rows = [_attention_row(machine, name, batch, context) for name in names]
        yield from rows
        if len(rows) > 1:
            ratio = (rows[0].share or 0.0) / (rows[1].share or 1.0)
            yield Row(
                f"decode attention, batch {batch}, context {context}", "", ratio, 0.9, "FlashAttention-3"
            )


def _attention_row(machine: Machine, name: str, batch: int, context: int) -> Row:
    """The step's part in it too: queries and keys are turned, keys and values written."""
    heads, kv_heads, dim = 28, 4, 128
    blocks = context // BLOCK
    nbytes = batch * context * 2 * kv_heads * dim * 2
    num_layers = max(2, min(28, (256 << 20) // nbytes))  # in turn, so that no cache holds what is read
    backend = choose_backend(name, machine.device)
    spec = [Paged(kv_heads, dim)] * num_layers
    cache = PagedTensors(spec, batch * blocks, BLOCK, torch.bfloat16, machine.device)
    for tensor in cache.tensors:
        tensor.normal_()
    layers = [
        AttentionLayer(index=index, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
        for index in range(num_layers)
    ]
    order = random.Random(0).sample(range(batch * blocks), batch * blocks)
    spans = [SequencePart(1, context - 1, order[row * blocks : (row + 1) * blocks]) for row in range(batch)]
    step = backend.attention(cache).plan(spans)
    qkv = torch.randn(batch, heads + 2 * kv_heads, dim, device=machine.device).to(torch.bfloat16)
    rotary = step.rotary(torch.randn(batch, dim // 2, device=machine.device), torch.bfloat16)

    def run() -> None:
        for layer in layers:
            step.write(layer, qkv, rotary)
            step.attend(layer, qkv)

    seconds = machine.seconds(captured(run) if machine.device.type == "cuda" else run) / num_layers
    what, told = f"{name} decode attention, batch {batch}, context {context}", f"{seconds * 1e6:.1f} µs"
    against = "KV bytes over the copy rate" + (
        " (too few bytes for it: two kernels' start)" if nbytes < 64 << 20 else ""
    )
    return Row(what, told, nbytes / seconds / machine.rates["copy"], 0.75, against)


def towers(machine: Machine) -> Iterator[Row]:
    """With windows, and with learned positions and deepstack. Each in torch, beside transformers'."""
    sides, share = ((64,), 0.1) if machine.is_small else ((448, 1008), 1.0)
    bench = Bench(2 if machine.is_small else 5, share, sides, torch.bfloat16, machine.device)
    for rows in (bench.qwen2_5_vl, bench.qwen3_vl_4b):
        for row in rows():
            told = f"{row.ours:.0f} {row.unit}"
            yield Row(f"tower, {row.what}", told, row.ours / row.theirs, 1.2, row.against)


def experts(machine: Machine) -> Iterator[Row]:
    for batch in (2,) if machine.is_small else (1, 8, 32, 256):
        yield _experts_row(machine, batch)


def _experts_row(machine: Machine, batch: int) -> Row:
    """The experts of layers of the 30B-A3B, each token with its own choice, without the router."""
    count, hidden, size, num_chosen = (8, 64, 32, 2) if machine.is_small else (128, 2048, 768, 8)
    made = functools.partial(torch.randn, device=machine.device, dtype=torch.bfloat16)
    layers = []
    for _ in range(2):  # in turn, so that no cache holds what is read
        weights = made(count, 2 * size, hidden).mul_(0.02), made(count, hidden, size).mul_(0.02)
        chosen = torch.rand(batch, count, device=machine.device).topk(num_chosen).indices
        layers.append((_stack_or_list(machine, *weights), chosen))
    x, shares = made(batch, hidden), torch.full((batch, num_chosen), 1 / num_chosen).to(made(1))

    def run() -> None:
        for compute, chosen in layers:
            compute(x, chosen, shares)

    seconds = machine.seconds(captured(run) if machine.device.type == "cuda" else run)
    num_read = sum(len(chosen.unique()) for _, chosen in layers)
    nbytes = num_read * 3 * hidden * size * 2
    what = f"experts of a layer, batch {batch}, {num_chosen} of {count}"
    told = f"{seconds / len(layers) * 1e6:.1f} µs, {num_read / len(layers):.0f} experts read"
    share = nbytes / seconds / machine.rates["copy"]
    return Row(what, told, share, 0.6, "bytes of the chosen experts over the copy rate")


def _stack_or_list(machine: Machine, gate_up: torch.Tensor, down: torch.Tensor) -> Experts:
    kernels = choose_backend("auto", machine.device).kernels
    if kernels is not None:
        return StackedExperts(gate_up, down, 0, kernels)
    return ListedExperts([(TorchLinear(a), TorchLinear(b)) for a, b in zip(gate_up, down, strict=True)], 0)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """As a CUDA graph: launches cost more than small kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def fidelity(machine: Machine) -> Iterator[Row]:
    from transformers import AutoModelForImageTextToText

    for shape in ("embedded", *machine.shapes):
        folder = machine.checkpoint(shape)
        num_tokens = 100 if machine.is_small else 600
        prompts = torch.randint(
            100, 200, (NUM_PROMPTS, 1, num_tokens), generator=torch.Generator().manual_seed(0)
        )
        logits: dict[str, torch.Tensor] = {}
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
        model = model.to(machine.device)
        for name in ("bf16", "float32"):
            with torch.inference_mode():
                last = [model(input_ids=prompt.to(machine.device)).logits[0, -1] for prompt in prompts]
                logits[name] = torch.stack(last).double().cpu()
            model = model.float()  # there, not on the host: the same weights
        del model
        if machine.device.type == "cuda":
            torch.cuda.empty_cache()
        with _runner(machine, shape, 2) as runner:
            prefilled = torch.stack([_hidden_logits(runner, prompt[0].tolist(), 0) for prompt in prompts])
            chunked = torch.stack([_hidden_logits(runner, prompt[0].tolist(), 37) for prompt in prompts])
        error = {
            name: _error(value, logits["float32"])
            for name, value in (("theirs", logits["bf16"]), ("ours", prefilled), ("chunked", chunked))
        }
        told = f"{error['ours']:.4f} ({error['chunked']:.4f} in chunks), transformers {error['theirs']:.4f}"
        share = max(error["ours"], error["chunked"]) / error["theirs"]
        yield Row(f"relative error of bf16 logits, {shape}", told, share, -1.5, "transformers' own")


def _error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def _hidden_logits(runner: ModelRunner, token_ids: Sequence[int], first: int) -> torch.Tensor:
    """Logits behind a prompt that is computed at once, or in two chunks of which the first has `first`
    tokens."""
    decoder, table = runner.decoder, list(range(-(-len(token_ids) // BLOCK)))
    with torch.inference_mode():
        for start, stop in ((0, first), (first, len(token_ids))):
            if start == stop:
                continue
            x = decoder.embed(torch.tensor(token_ids[start:stop], device=runner.device))
            positions = torch.arange(start, stop, device=runner.device).expand(3, -1)
            hidden = decoder(x, positions, runner.attention.plan([SequencePart(stop - start, start, table)]))
        return decoder.logits(hidden[-1:])[0].double().cpu()


def _runner(
    machine: Machine, shape: str, num_seqs: int, **options: Any
) -> AbstractContextManager[ModelRunner]:
    return open_runner(machine.checkpoint(shape), machine.device, "bfloat16", num_seqs, **options)


def decode(machine: Machine) -> Iterator[Row]:
    wanted = {1: 0.8, 32: 0.7, 256: 0.6}
    for has_graphs in (True, False):
        for shape in machine.shapes:
            with _runner(machine, shape, 4 if machine.is_small else 256, cuda_graphs=has_graphs) as runner:
                info = runner._info.text
                for batch in (2,) if machine.is_small else (1, 32, 256):
                    seconds = decode_seconds(runner, batch)
                    nbytes = 2 * num_weights(info) + batch * CONTEXT * kv_bytes(info)
                    share = nbytes / seconds / machine.rates["copy"]
                    mode = "graphs" if has_graphs else "eager"
                    name = f"decode step, {shape}, batch {batch}, context {CONTEXT}, {mode}"
                    told = f"{seconds * 1000:.2f} ms, {batch / seconds:.0f} tokens/s"
                    yield Row(
                        name,
                        told,
                        share,
                        wanted.get(batch) if has_graphs else None,
                        "weights + KV over the copy rate",
                    )
                    if has_graphs:
                        seconds = decode_seconds(runner, batch, temperature=0.7, top_p=0.8, top_k=20)
                        yield Row(
                            f"{name}, drawn",
                            f"{seconds * 1000:.2f} ms",
                            nbytes / seconds / machine.rates["copy"],
                        )


def prefill(machine: Machine) -> Iterator[Row]:
    with _runner(machine, machine.large, 2, cuda_graphs=False) as runner:
        info = runner._info.text
        for length in (64,) if machine.is_small else (2048, 8192):
            seconds = statistics.median(prefill_seconds(runner, length) for _ in range(6))
            flops = prefill_flops(info, length)
            name, told = (
                f"prefill, {machine.large}, {length} tokens",
                f"{seconds * 1000:.1f} ms, {length / seconds:.0f} tokens/s",
            )
            yield Row(name, told, flops / seconds / machine.rates["matmul"], 0.6, "the matmul rate")


def _serve(machine: Machine, *options: str) -> AbstractContextManager[Served]:
    return serve(
        machine.checkpoint(machine.shapes[0]),
        "--device",
        machine.device.type,
        "--max-num-seqs",
        "64",
        *options,
    )


def server(machine: Machine) -> Iterator[Row]:
    size = (112, 112) if machine.is_small else (840, 840)  # 900 tokens each: with the text about 2,800
    count, num_output = (2, 4) if machine.is_small else (32, 120)
    with _serve(machine) as served:
        rng = random.Random(0)
        warm = Workload(num_words=20, num_output=4, num_images=1, sizes=(size,))
        asyncio.run(run_load(served.url, warm, warm.chats(2, rng), 2, 0.0, rng))
        for turns, wanted, published in ((1, 10.0, "3.85"), (3, 20.0, "6.05, 7.98 with its prefix cache")):
            load = Workload(num_words=60, num_output=num_output, num_images=3, sizes=(size,), num_turns=turns)
            chats = load.chats(2 * count, rng)
            start = time.perf_counter()
            summary = summarize(
                asyncio.run(run_load(served.url, load, chats, count, 0.0, rng)),
                time.perf_counter() - start,
                {},
            )
            rate = summary["request_throughput"]
            ttft, itl = summary["ttft_ms"]["median"], summary["itl_ms"]["p99"]
            told = f"{rate:.2f} requests/s, TTFT {ttft:.0f} ms, ITL P99 {itl:.1f} ms"
            users = f"{count} users, 3 pictures, {num_output} out, {turns} turn{'s' * (turns > 1)}"
            name = f"server, {machine.shapes[0]}, {users}"
            yield Row(
                name,
                told,
                rate / wanted,
                1.0,
                f"{wanted:.0f} requests/s (DashInfer-VLM, A100, published: {published})",
            )
            yield from [Row("error", error[:300]) for error in summary["errors"][:3]]
    yield _transformers_row(machine, num_output)


def _transformers_row(machine: Machine, num_output: int) -> Row:
    """One after the other, as `generate()` serves; the pictures' tokens stand in for the pictures, which
    favours it."""
    from transformers import Qwen2VLForConditionalGeneration

    folder = machine.checkpoint(machine.shapes[0])
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    model = model.to(machine.device)
    token_ids = torch.randint(100, 200, (1, 64 if machine.is_small else 2807), device=machine.device)

    def run() -> None:
        model.generate(
            input_ids=token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=num_output,
            min_new_tokens=num_output,
            do_sample=False,
        )

    run()
    return Row(
        f"transformers, {machine.shapes[0]}, prompts of {token_ids.shape[1]} tokens, {num_output} out",
        f"{1 / _timed(run):.2f} requests/s",
    )


def isolation(machine: Machine) -> Iterator[Row]:
    """Pictures that nobody has seen for long: the ViT's cache is smaller than the round they come in.

    As many settings as the time allows.
    """
    side, num_pictures, num_output = (112, 8, 15) if machine.is_small else (448, 256, 1000)
    caches = ("--no-prefix-caching", "--embedding-pool-mib", "32")
    for slice_ms, sharing in itertools.product(("5", "2", "10"), ("timeslice", "mps")):
        setting = f"{sharing}, ViT slice {slice_ms} ms"
        try:
            with _serve(machine, "--gpu-sharing", sharing, "--vit-slice-ms", slice_ms, *caches) as served:
                alone, mixed, num_sent = asyncio.run(
                    _itl_with_and_without(served.url, side, num_pictures, num_output)
                )
        except RuntimeError as error:
            yield Row(f"isolation by {setting}", str(error))
            continue
        told = f"{mixed * 1000:.1f} ms, alone {alone * 1000:.1f} ms, {num_sent} pictures"
        yield Row(
            f"P99 ITL of 8 streams while pictures of {side}×{side} are encoded, {setting}",
            told,
            mixed / alone,
            -1.2,
            "the streams alone",
        )


async def _itl_with_and_without(
    url: str, side: int, num_pictures: int, num_output: int
) -> tuple[float, float, int]:
    """P99 of the gaps of eight streams, in seconds, alone and while pictures come without a pause, of which
    each wants one token; their number."""
    rng = random.Random(0)
    streams = Workload(num_words=20, num_output=num_output)
    pictures = Workload(num_words=5, num_output=1, num_images=1, sizes=((side, side),))
    # Written out beforehand: the loop that notes the times of tokens has nothing else to do.
    bodies = [
        json.dumps(pictures.body([{"role": "user", "content": turns[0]}])).encode()
        for turns in pictures.chats(num_pictures, rng)
    ]
    waiting = itertools.cycle(bodies)
    gaps, num_sent = [], 0

    async def keep_sending(session: aiohttp.ClientSession) -> None:
        nonlocal num_sent
        while True:
            async with session.post(
                f"{url}/v1/chat/completions", data=next(waiting), headers={"Content-Type": "application/json"}
            ) as response:
                await response.read()
                response.raise_for_status()
            num_sent += 1

    async with open_session() as session:
        for has_pictures in (False, True):
            contents = [turns[0] for turns in streams.chats(8, rng)]
            running = [
                asyncio.create_task(send(session, url, streams.body([{"role": "user", "content": content}])))
                for content in contents
            ]
            noise = [asyncio.create_task(keep_sending(session)) for _ in range(4 if has_pictures else 0)]
            results = await asyncio.gather(*running)
            for task in noise:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.gather(*noise, return_exceptions=True)
            found = [gap for result in results for gap in result.gaps[len(result.gaps) // 10 :]]
            if not found:
                raise RuntimeError(f"the streams yielded nothing: {results[0].error}")
            gaps.append(float(np.percentile(found, 99)))
    return gaps[0], gaps[1], num_sent
