"""What the engine reaches on this machine: each figure beside transformers, beside itself, or beside what the
machine can do, in one run.

    python -m tools.bench_engine                                 # 0.31 B parameters, everything
    python -m tools.bench_engine --shape 2b --parts rates int8   # Qwen2-VL-2B's shape

Needs transformers (`pip install -e '.[test]'`). Weights are random: speed does not depend on their values. It
starts servers of its own, with all cores for the LLM (nothing else runs in these loads but in `turns` and
`memory`). Rounds are interleaved and medians are told, since shared machines drift.

rates   prefill and decode tokens/s beside `generate()` in the same type (or in `--hf-dtype`); a decode step
        beside the read rate of memory, prefill beside the rate of matrix products
int8    decode tokens/s with `--quantization int8` beside without
context decode tokens/s of one request behind 8,000 tokens beside behind 100
repeats decode tokens/s with `--speculative ngram` beside without, of an answer that repeats its prompt, and
        of one that does not
turns   TTFT of the second and the sixth turn of a chat with three pictures beside its first
memory  resident memory of the LLM process beside its weights and KV cache
itl     P99 ITL of four streams while 512-token prompts arrive without pause, beside the streams alone; and
        the prompts' rate
"""

from __future__ import annotations

import argparse
import asyncio
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForImageTextToText

from pipeline.families import read_model_info
from tools.bench_serving import Body, Result, Workload, converse, open_session, run_load, send
from tools.memory_rate import memory_rate
from tools.processes import resident_bytes, workers_of
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.runners import kv_bytes, num_layer_weights, num_weights, weight_size
from workers.nn.loader import choose_dtype

PARTS = ("rates", "int8", "context", "repeats", "turns", "memory", "itl")
NUM_STREAMS = 4


class Row(NamedTuple):
    what: str
    ours: float
    against: str
    theirs: float
    unit: str

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs


class Served(NamedTuple):
    url: str
    process: subprocess.Popen[str]

    def memory_of(self, role: str) -> int:
        """Resident bytes of the worker of that role."""
        for name, pid in workers_of(self.process.pid).items():
            if name.startswith(f"{role}."):
                return resident_bytes(pid)
        raise RuntimeError(f"the server has no {role} process")


@contextmanager
def serve(model: Path, *options: str) -> Iterator[Served]:
    """A server of our own, for as long as it is needed. It tells each token as text of an answer, whatever
    the model's thoughts and calls look like. Raises RuntimeError when it does not start."""
    command = [
        sys.executable, "-m", "launcher", "--model", str(model), "--port", "0", "--max-model-len", "8192",
        "--log-level", "warning", "--reasoning-parser", "none", "--tool-call-parser", "none", *options,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = next(
                (
                    line.split()[2].removesuffix("/v1")
                    for line in process.stdout
                    if line.startswith("Serving at")
                ),
                None,
            )
            if url is None:
                raise RuntimeError("the server did not start")
            yield Served(url, process)
        finally:
            process.send_signal(signal.SIGINT)


ALL_CORES = ("--llm-cores", str(os.cpu_count()))


def raise_failed(results: Sequence[Result]) -> None:
    if failed := [result.error for result in results if result.error]:
        raise RuntimeError(failed[0])


def load(served: Served, workload: Workload, count: int, rng: random.Random) -> tuple[list[Result], float]:
    """`count` chats at once, and the seconds they took together."""
    chats = workload.chats(count, rng)
    start = time.perf_counter()
    results = asyncio.run(run_load(served.url, workload, chats, count, 0.0, rng))
    seconds = time.perf_counter() - start
    raise_failed(results)
    if any(len(result.arrivals) != result.num_output_tokens for result in results):
        raise RuntimeError(
            "not every token was an event of its own: with this tokenizer rates cannot be told from events"
        )
    return results, seconds


def prefill_rate(served: Served, num_words: int, rng: random.Random) -> float:
    (result,), _ = load(served, Workload(num_words=num_words, num_output=1), 1, rng)
    return result.num_prompt_tokens / result.ttft


def decode_rate(served: Served, batch: int, num_output: int, rng: random.Random, num_words: int = 8) -> float:
    """Tokens/s of `batch` streams together, between the first token of the last stream and the last of the
    first."""
    results, _ = load(served, Workload(num_words=num_words, num_output=num_output), batch, rng)
    start, end = max(r.arrivals[0] for r in results), min(r.arrivals[-1] for r in results)
    if start >= end:
        raise RuntimeError("the streams were too short to run side by side: ask for more --output-tokens")
    return sum(sum(start < at <= end for at in result.arrivals) for result in results) / (end - start)


def repeat_rate(served: Served, batch: int, num_output: int, temperature: float, rng: random.Random) -> float:
    """Tokens/s of `batch` chats together, in their second turn: the question of the first turn again, behind
    its answer. Without a temperature the second answer is much like the first."""
    workload = Workload(num_words=48, num_output=num_output, temperature=temperature)

    async def ask_twice() -> list[Result]:
        async with open_session() as session:
            chats = [(turn, turn) for (turn,) in workload.chats(batch, rng)]
            asked = await asyncio.gather(*(converse(session, served.url, workload, chat) for chat in chats))
        raise_failed([result for results in asked for result in results])
        return [results[1] for results in asked]

    results = asyncio.run(ask_twice())
    seconds = max(r.sent + r.e2el for r in results) - min(r.arrivals[0] for r in results)
    return sum(result.num_output_tokens for result in results) / seconds


def generate_seconds(model: Any, batch: int, length: int, num_output: int) -> float:
    ids = torch.randint(100, 4000, (batch, length))
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=num_output,
            max_new_tokens=num_output,
        )
    return time.perf_counter() - start


def generate_decode_rate(model: Any, batch: int, num_output: int) -> float:
    return (
        batch
        * (num_output - 1)
        / (generate_seconds(model, batch, 16, num_output) - generate_seconds(model, batch, 16, 1))
    )


def best_of(call: Callable[[], object], count: int = 4) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations/s of all cores."""
    left, right = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best_of(lambda: left @ right, 3)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Bench:
    """`dtype` is ours, `hf_dtype` that of transformers."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, hf_dtype: torch.dtype, rounds: int, num_output: int
    ) -> None:
        self.folder, self.dtype, self.hf_dtype, self.rounds, self.num_output = (
            folder,
            dtype,
            hf_dtype,
            rounds,
            num_output,
        )
        self.info = read_model_info(folder).text
        self.weight_bytes = num_weights(self.info) * weight_size(folder, dtype)
        self.rng = random.Random(0)

    def medians(self, calls: dict[str, Callable[[], float]]) -> dict[str, float]:
        """Each call once a round, in turn; the first round, which warms up, is not counted."""
        values: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(self.rounds + 1):
            for name, call in calls.items():
                value = call()
                if number:
                    values[name].append(value)
        return {name: statistics.median(of_name) for name, of_name in values.items()}

    def serve(self, *options: str) -> AbstractContextManager[Served]:
        return serve(self.folder, "--dtype", name_of(self.dtype), "--device", "cpu", *options)

    def rates(self) -> list[Row]:
        model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=self.hf_dtype).eval()
        with self.serve(*ALL_CORES) as served:
            found = self.medians(
                {
                    "decode 1": lambda: decode_rate(served, 1, self.num_output, self.rng),
                    "hf decode 1": lambda: generate_decode_rate(model, 1, self.num_output),
                    "read": lambda: memory_rate().bytes_per_s,
                    "decode 8": lambda: decode_rate(served, 8, 2 * self.num_output, self.rng),
                    "hf decode 8": lambda: generate_decode_rate(model, 8, self.num_output),
                    "prefill 512": lambda: prefill_rate(served, 500, self.rng),
                    "hf prefill 512": lambda: 512 / generate_seconds(model, 1, 512, 1),
                    "prefill 2048": lambda: prefill_rate(served, 2036, self.rng),
                    "hf prefill 2048": lambda: 2048 / generate_seconds(model, 1, 2048, 1),
                    "matmul": lambda: matmul_rate(self.dtype),
                }
            )
        kinds = {
            "decode 1": "decode, 1 request",
            "decode 8": "decode, 8 requests",
            "prefill 512": "prefill, 512",
            "prefill 2048": "prefill, 2048",
        }
        theirs = "transformers" if self.hf_dtype == self.dtype else f"transformers, {name_of(self.hf_dtype)}"
        rows = [
            Row(what, found[name], theirs, found[f"hf {name}"], "tokens/s") for name, what in kinds.items()
        ]
        rows.append(
            Row(
                "decode step, 1 request, reads",
                found["decode 1"] * self.weight_bytes / 1e9,
                "memory",
                found["read"] / 1e9,
                "GB/s",
            )
        )
        layers = num_layer_weights(self.info)  # the output layer runs for one token only
        rows.append(
            Row(
                "prefill, 512, computes",
                found["prefill 512"] * 2 * layers / 1e9,
                "matrix products",
                found["matmul"] / 1e9,
                "GFLOP/s",
            )
        )
        return rows

    def int8(self) -> list[Row]:
        with self.serve(*ALL_CORES) as plain, self.serve(*ALL_CORES, "--quantization", "int8") as quantized:
            found = self.medians(
                {
                    "plain 1": lambda: decode_rate(plain, 1, self.num_output, self.rng),
                    "int8 1": lambda: decode_rate(quantized, 1, self.num_output, self.rng),
                    "plain 8": lambda: decode_rate(plain, 8, 2 * self.num_output, self.rng),
                    "int8 8": lambda: decode_rate(quantized, 8, 2 * self.num_output, self.rng),
                    "plain prefill": lambda: prefill_rate(plain, 500, self.rng),
                    "int8 prefill": lambda: prefill_rate(quantized, 500, self.rng),
                }
            )
        name = name_of(self.dtype)
        kinds = {
            "1": "decode in int8, 1 request",
            "8": "decode in int8, 8 requests",
            "prefill": "prefill in int8, 512",
        }
        return [
            Row(what, found[f"int8 {kind}"], name, found[f"plain {kind}"], "tokens/s")
            for kind, what in kinds.items()
        ]

    def context(self) -> list[Row]:
        with self.serve(*ALL_CORES) as served:
            found = self.medians(
                {
                    length: partial(decode_rate, served, 1, self.num_output, self.rng, num_words)
                    for length, num_words in (("100", 88), ("8,000", 7988))
                }
            )
        return [
            Row("decode behind 8,000 tokens", found["8,000"], "behind 100", found["100"], "tokens/s"),
        ]

    def repeats(self) -> list[Row]:
        hot = 2.0  # what is drawn then repeats nothing
        with self.serve(*ALL_CORES) as plain, self.serve(*ALL_CORES, "--speculative", "ngram") as guessing:
            calls: dict[str, Callable[[], float]] = {}
            for name, served in (("plain", plain), ("guessing", guessing)):
                calls |= {
                    f"{name} 1": partial(repeat_rate, served, 1, 2 * self.num_output, 0.0, self.rng),
                    f"{name} 4": partial(repeat_rate, served, 4, 2 * self.num_output, 0.0, self.rng),
                    f"{name} hot": partial(repeat_rate, served, 1, self.num_output, hot, self.rng),
                }
            found = self.medians(calls)
        kinds = {
            "1": "decode with guesses, 1 answer that repeats",
            "4": "decode with guesses, 4 answers that repeat",
            "hot": "decode with guesses, 1 answer that does not repeat",
        }
        return [
            Row(what, found[f"guessing {kind}"], "without", found[f"plain {kind}"], "tokens/s")
            for kind, what in kinds.items()
        ]

    def turns(self) -> list[Row]:
        with self.serve() as served:
            return [row for size in ((448, 448), (1024, 768)) for row in self._turns(served, size)]

    def _turns(self, served: Served, size: tuple[int, int]) -> Iterator[Row]:
        workload = Workload(num_words=24, num_output=16, num_images=3, sizes=(size,), num_turns=6)

        async def chat() -> list[float]:
            async with open_session() as session:
                results = await converse(session, served.url, workload, workload.chats(1, self.rng)[0])
            return [result.ttft for result in results]

        times = [asyncio.run(chat()) for _ in range(self.rounds + 1)][1:]
        medians = [statistics.median(values) * 1000 for values in zip(*times, strict=True)]
        pictures = "3 pictures of {} × {}".format(*size)
        for name, turn in (("second", 1), ("sixth", 5)):
            yield Row(f"TTFT of the {name} turn, {pictures}", medians[turn], "first turn", medians[0], "ms")

    def memory(self) -> list[Row]:
        kv_gib = 0.5
        with self.serve("--kv-cache-gib", str(kv_gib), "--max-num-seqs", "256") as served:
            # touches the cache, which is not resident before
            load(served, Workload(num_words=2000, num_output=2), 12, self.rng)
            load(served, Workload(num_words=24, num_output=4, num_images=1), 2, self.rng)
            resident = served.memory_of("llm")
        kv_token = kv_bytes(self.info, self.dtype.itemsize)
        kv = min(kv_gib * (1 << 30), 12 * 2048 * kv_token)
        needed = self.weight_bytes + kv
        return [
            Row(
                "resident memory of the LLM process",
                resident / (1 << 20),
                "weights + KV used",
                needed / (1 << 20),
                "MiB",
            )
        ]

    def itl(self) -> list[Row]:
        streams = Workload(num_words=16, num_output=12 * self.num_output, wants_token_ids=True)
        prompts = Workload(num_words=500, num_output=1)

        def run(served: Served, has_prompts: bool) -> tuple[list[float], float]:
            """Gaps of the streams while all of them run, and prompt tokens/s meanwhile."""

            def prompt() -> dict[str, Any]:
                (content,) = prompts.chats(1, self.rng)[0]
                return prompts.body([{"role": "user", "content": content}])

            beside = asyncio.run(
                streams_beside(served.url, streams, self.rng, prompt if has_prompts else None)
            )
            if not beside.others:
                return beside.gaps, 0.0
            end = max(result.sent + result.e2el for result in beside.others)
            return beside.gaps, sum(result.num_prompt_tokens for result in beside.others) / (
                end - beside.start
            )

        alone: list[float] = []
        mixed: list[float] = []
        rates: list[float] = []
        with self.serve(*ALL_CORES) as served:
            idle = statistics.median(prefill_rate(served, 500, self.rng) for _ in range(self.rounds + 1))
            for number in range(self.rounds + 1):
                quiet, _ = run(served, False)
                busy, rate = run(served, True)
                if number:
                    alone.append(percentile(quiet, 99))
                    mixed.append(percentile(busy, 99))
                    rates.append(rate)
        return [
            Row(
                "P99 ITL of 4 streams, prompts arriving",
                statistics.median(mixed) * 1000,
                "the streams alone",
                statistics.median(alone) * 1000,
                "ms",
            ),
            Row("prefill while 4 streams run", statistics.median(rates), "idle engine", idle, "tokens/s"),
        ]


class Beside(NamedTuple):
    """`others` are the requests that were answered while the streams ran, from `start` on."""

    gaps: list[float]
    others: list[Result]
    start: float


async def streams_beside(
    url: str, streams: Workload, rng: random.Random, other: Callable[[], Body] | None
) -> Beside:
    """Gaps of four streams while all of them run.

    Two requests of what `other` makes are always under way beside them.
    """
    others: list[Result] = []

    async def keep_sending() -> None:
        assert other is not None
        while True:
            result = await send(session, url, other())
            raise_failed([result])
            others.append(result)

    async with open_session() as session:
        bodies = [
            streams.body([{"role": "user", "content": turns[0]}]) for turns in streams.chats(NUM_STREAMS, rng)
        ]
        results = [Result(sent=0.0) for _ in bodies]
        running = [
            asyncio.create_task(send(session, url, body, result=result))
            for body, result in zip(bodies, results, strict=True)
        ]
        while not all(result.arrivals for result in results):
            await asyncio.sleep(0.01)
            raise_failed(results)
        start = time.perf_counter()
        noise = [asyncio.create_task(keep_sending()) for _ in range(2 if other else 0)]
        await asyncio.gather(*running)
        raise_failed(results)
        for task in noise:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*noise, return_exceptions=True)
    end = min(result.arrivals[-1] for result in results)
    gaps = [
        gap
        for result in results
        for at, gap in zip(result.arrivals[1:], result.gaps, strict=True)
        if start < at <= end
    ]
    return Beside(gaps, others, start)


def percentile(values: Sequence[float], percent: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def measure(bench: object, parts: Sequence[str], file: Path | None) -> None:
    """Runs parts of a bench, methods that yield rows, and prints a table as they come; writes the figures to
    a file, too, if there is one."""
    rows: list[Row] = []
    print("| | ours | | against | | ratio |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for part in parts:
        for row in getattr(bench, part)():
            rows.append(row)
            print(
                f"| {row.what} | {row.ours:.1f} | {row.unit} | {row.against} | {row.theirs:.1f} | "
                f"{row.ratio:.2f} |",
                flush=True,
            )
    if file is not None:
        file.write_text(json.dumps([{**row._asdict(), "ratio": row.ratio} for row in rows], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.3b", choices=SHAPES, help="of the random checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint to measure instead")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument(
        "--hf-dtype", choices=("float32", "bfloat16"), help="of transformers, if not the same"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    dtype = choose_dtype(args.dtype, torch.device("cpu"))
    hf_dtype = choose_dtype(args.hf_dtype or name_of(dtype), torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            make_checkpoint(folder, args.shape)
        bench = Bench(folder, dtype, hf_dtype, args.rounds, args.output_tokens)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{args.model or args.shape}, {dtype}; memory "
            f"{memory_rate().bytes_per_s / 1e9:.0f} GB/s, matrix products "
            f"{matmul_rate(dtype) / 1e9:.0f} GFLOP/s; median of {args.rounds} rounds\n",
            flush=True,
        )
        measure(bench, args.parts, args.json)


if __name__ == "__main__":
    main()
