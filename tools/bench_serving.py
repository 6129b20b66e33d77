"""Load on an OpenAI endpoint, and what users feel of it: TTFT, ITL, TPOT, E2EL and throughput, defined as `vllm bench serve` does.

    python tools/bench_serving.py --base-url http://127.0.0.1:8000 --num-prompts 64 --concurrency 8        # closed loop
    python tools/bench_serving.py --base-url http://127.0.0.1:8000 --num-prompts 64 --request-rate 4       # open loop, Poisson
    python tools/bench_serving.py --compare-with-hf --model FOLDER                                         # engine rates, both in one run

The third form starts a server of its own and measures prefill and decode tokens/s at 1 and 8 requests beside Hugging Face's
`generate()`, in interleaved rounds. Without --model it makes a random checkpoint of 0.3 B parameters of the real architecture.

TTFT: sent to first output. ITL: gaps between streamed events, pooled. TPOT: (E2EL - TTFT) / (output tokens - 1) of a request.
E2EL: sent to last byte.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

WORDS = ["red", "blue", "green", "circle", "square", "star", "cross", "ring", "left", "right", "top", "bottom", "shape", "picture", "number"]


@dataclass
class Result:
    sent: float
    ttft: float = 0.0
    e2el: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None


def make_body(rng: random.Random, num_words: int, num_output: int, num_images: int, size: tuple[int, int]) -> dict[str, Any]:
    """A request that no cache has seen: random words, random pixels."""
    parts: list[dict[str, Any]] = []
    for _ in range(num_images):
        pixels = np.random.default_rng(rng.getrandbits(63)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        parts.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}})
    parts.append({"type": "text", "text": " ".join(rng.choices(WORDS, k=num_words))})
    return {
        "messages": [{"role": "user", "content": parts}], "max_tokens": num_output, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip


async def send(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Result:
    result = Result(sent=time.perf_counter())
    try:
        await _receive(session, url, body, result)
    except (aiohttp.ClientError, OSError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def _receive(session: aiohttp.ClientSession, url: str, body: dict[str, Any], result: Result) -> None:
    last = result.sent
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            result.error = f"{response.status} {await response.text()}"
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            now = time.perf_counter()
            if "error" in event:
                result.error = event["error"]["message"]
                return
            if event.get("usage"):
                result.num_prompt_tokens, result.num_output_tokens = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                if not result.ttft:
                    result.ttft = now - result.sent
                else:
                    result.gaps.append(now - last)
                last = now
    result.e2el = time.perf_counter() - result.sent
    result.ttft = result.ttft or result.e2el


async def run_load(url: str, bodies: Sequence[dict[str, Any]], concurrency: int, request_rate: float, rng: random.Random) -> list[Result]:
    """Closed loop with `concurrency` requests at a time, or open loop with Poisson arrivals at `request_rate` a second."""
    gate = asyncio.Semaphore(concurrency or len(bodies))
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(body: dict[str, Any]) -> Result:
            async with gate:
                return await send(session, url, body)

        tasks = []
        for body in bodies:
            tasks.append(asyncio.create_task(one(body)))
            if request_rate:
                await asyncio.sleep(rng.expovariate(request_rate))
        return list(await asyncio.gather(*tasks))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, P99 and maximum in milliseconds."""
    if not values:
        return {}
    ms = np.array(values) * 1000
    return {"mean": float(ms.mean()), "median": float(np.median(ms)), "p99": float(np.percentile(ms, 99)), "max": float(ms.max())}


def summarize(results: Sequence[Result], wall: float) -> dict[str, Any]:
    good = [result for result in results if not result.error]
    return {
        "completed": len(good), "failed": len(results) - len(good), "wall_s": wall,
        "request_throughput": len(good) / wall, "output_tokens_per_s": sum(r.num_output_tokens for r in good) / wall,
        "total_tokens_per_s": sum(r.num_output_tokens + r.num_prompt_tokens for r in good) / wall,
        "ttft_ms": spread([r.ttft for r in good]), "tpot_ms": spread([r.tpot for r in good if r.tpot is not None]),
        "itl_ms": spread([gap for r in good for gap in r.gaps]), "e2el_ms": spread([r.e2el for r in good]),
        "errors": sorted({r.error for r in results if r.error}),
    }  # fmt: skip


def print_summary(summary: dict[str, Any]) -> None:
    for name in ("completed", "failed", "wall_s", "request_throughput", "output_tokens_per_s", "total_tokens_per_s"):
        print(f"{name:22} {summary[name]:.2f}")
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms"):
        print(f"{name:22} " + "  ".join(f"{key} {value:.1f}" for key, value in summary[name].items()))
    for error in summary["errors"][:3]:
        print("error:", error[:300])


# Engine rates beside Hugging Face.


def make_checkpoint(folder: Path) -> None:
    """0.31 B parameters: LM hidden 768, 12 layers, 6/2 heads, ffn 3072; vision depth 16, embed 640, 8 heads. Weights are random."""
    import shutil

    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from launcher.checkpoints import EMBEDDED

    embedded = json.loads((EMBEDDED / "model" / "config.json").read_text())
    ids = {name: embedded[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    text: dict[str, Any] = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
        "vocab_size": 151_936, "max_position_embeddings": 32_768, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {"depth": 16, "embed_dim": 640, "num_heads": 8, "hidden_size": 768}
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    Qwen2VLForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / "model" / name, folder / name)
    tokenizer = json.loads((EMBEDDED / "model" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    start = 1 + max(*vocab.values(), *(token["id"] for token in tokenizer["added_tokens"]))
    vocab.update({f"\u0120w{token}": token for token in range(start, text["vocab_size"])})  # every id is a word, so every token is an event
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@contextmanager
def served(model: Path, dtype: str) -> Any:
    """A server of our own, for as long as it is needed."""
    command = [
        sys.executable,
        "-m",
        "launcher",
        "--model",
        str(model),
        "--dtype",
        dtype,
        "--port",
        "0",
        "--max-model-len",
        "4096",
        "--llm-cores",
        str(os.cpu_count()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield next(line.split()[2].removesuffix("/v1") for line in process.stdout if line.startswith("Serving at"))
        finally:
            process.send_signal(signal.SIGINT)


def measure_server(url: str, batch: int, num_words: int, num_output: int, rng: random.Random) -> tuple[float, float]:
    """Prefill and decode tokens/s with `batch` requests at once."""

    def load(output: int, words: int) -> tuple[list[Result], float]:
        bodies = [make_body(rng, words, output, 0, (0, 0)) for _ in range(batch)]
        start = time.perf_counter()
        results = asyncio.run(run_load(url, bodies, batch, 0.0, rng))
        assert not any(result.error for result in results), results[0].error
        return results, time.perf_counter() - start

    prefill, wall = load(1, num_words)
    decode, _ = load(num_output, 8)
    steps = [result.tpot for result in decode if result.tpot is not None]
    return sum(result.num_prompt_tokens for result in prefill) / wall, batch / statistics.mean(steps)


def measure_hf(model: Any, batch: int, num_words: int, num_output: int) -> tuple[float, float]:
    """The same for `generate()`, as a static batch."""
    import torch

    def timed(length: int, new_tokens: int) -> float:
        ids = torch.randint(100, 4000, (batch, length))
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        return time.perf_counter() - start

    prefill = batch * num_words / timed(num_words, 1)
    first = timed(16, 1)
    return prefill, batch * (num_output - 1) / (timed(16, num_output) - first)


def measure_machine() -> dict[str, float]:
    """Read bandwidth and float32 matmul rate of all cores, for comparing runs on different machines."""
    import torch

    block = torch.ones(1 << 28)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    return {"read_gb_per_s": block.nbytes / best(block.sum) / 1e9, "matmul_gflop_per_s": 2 * 2048**3 / best(lambda: left @ right) / 1e9}


def compare_with_hf(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import Qwen2VLForConditionalGeneration

    from workers.nn.loader import choose_dtype

    dtype = choose_dtype(args.dtype, torch.device("cpu"))
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            make_checkpoint(folder)
        model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        rows: dict[str, list[tuple[float, float]]] = {}
        with served(folder, str(dtype).removeprefix("torch.")) as url:
            measure_server(url, 1, 32, 8, rng)  # warm-up of both
            measure_hf(model, 1, 32, 8)
            for _ in range(args.rounds):
                for batch in (1, 8):
                    rows.setdefault(f"ours x{batch}", []).append(measure_server(url, batch, args.input_words, args.output_tokens, rng))
                    rows.setdefault(f"transformers x{batch}", []).append(measure_hf(model, batch, args.input_words, args.output_tokens))
    table = {
        name: {"prefill": statistics.median(prefill for prefill, _ in runs), "decode": statistics.median(decode for _, decode in runs)}
        for name, runs in rows.items()
    }
    machine = measure_machine()
    readings = ", ".join(f"{name} {value:.0f}" for name, value in machine.items())
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, {dtype}, torch {torch.__version__}; {readings}")
    print(f"tokens/s, median of {args.rounds} interleaved rounds; prompts of about {args.input_words} tokens, {args.output_tokens} output tokens")
    print("\n| requests at once | prefill ours | transformers | ratio | decode ours | transformers | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for batch in (1, 8):
        ours, theirs = table[f"ours x{batch}"], table[f"transformers x{batch}"]
        cells = [f"{ours[kind]:.0f} | {theirs[kind]:.0f} | {ours[kind] / theirs[kind]:.2f}" for kind in ("prefill", "decode")]
        print(f"| {batch} | {' | '.join(cells)} |")
    return {"table": table, "machine": machine}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=0, help="closed loop: requests at a time (default: all)")
    parser.add_argument("--request-rate", type=float, default=0.0, help="open loop: arrivals a second")
    parser.add_argument("--input-words", type=int, default=256, help="words of text in a prompt; about as many tokens")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--images", type=int, default=0, help="pictures in a request")
    parser.add_argument("--image-size", default="448x448", help="WIDTHxHEIGHT")
    parser.add_argument("--compare-with-hf", action="store_true", help="engine rates beside transformers' generate(), in one run")
    parser.add_argument("--model", type=Path, help="checkpoint for --compare-with-hf")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="for --compare-with-hf")
    parser.add_argument("--rounds", type=int, default=3, help="for --compare-with-hf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    if args.compare_with_hf:
        figures = compare_with_hf(args)
    else:
        rng = random.Random(args.seed)
        width, _, height = args.image_size.partition("x")
        size = (int(width), int(height))
        bodies = [make_body(rng, args.input_words, args.output_tokens, args.images, size) for _ in range(args.num_prompts)]
        start = time.perf_counter()
        results = asyncio.run(run_load(args.base_url, bodies, args.concurrency, args.request_rate, rng))
        figures = summarize(results, time.perf_counter() - start)
        print_summary(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
