"""What stands around the model: a step of some streams through HTTP, beside the same step in process.

    python -m tools.bench_endpoint                       # 8 streams, 0.31 B parameters
    python -m tools.bench_endpoint --model FOLDER --streams 8 --rounds 5

In process: the LLM worker's runner with the same number of sequences and all cores, nothing else. Through
HTTP: a server with all cores for its LLM, and a client of its own process that does as little as it can. Both
begin with short prompts and yield the same number of tokens. Rounds are interleaved; the ratio is the median
of the rounds' ratios. The client computes on the same cores, and no server can help that: so its CPU time of
a step is told, and the ratio once more without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.process.compute_threads import spread_threads
from pipeline.wire.packing import pack_int32
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.steps import SequenceStart, SequenceStep
from tools.bench_engine import ALL_CORES, Served, name_of, serve
from tools.bench_streams import cpu_seconds
from tools.processes import workers_of
from tools.random_checkpoint import SHAPES, make_checkpoint
from tools.runners import BLOCK, open_runner, plan_of
from workers.llm.model_runner import ModelRunner
from workers.nn.loader import choose_dtype

PROMPT = 40  # tokens of a sequence in process: about those of a chat's question in its template
CPU = torch.device("cpu")
TOLD = ("llm.0", "api.0", "preprocess.0")


class Step(NamedTuple):
    """Seconds of one step, and of the CPU in it, by process."""

    seconds: float
    cpu: dict[str, float]


def step_in_process(runner: ModelRunner, num_streams: int, num_output: int) -> Step:
    blocks = -(-(PROMPT + num_output) // BLOCK) + 1
    sampling = SamplingParams(temperature=0, seed=1)
    starts = [
        SequenceStart(
            slot, PROMPT, sampling, pack_int32([7] * PROMPT), num_computed_tokens=PROMPT - 1,
            block_table=pack_int32(range(slot * blocks, (slot + 1) * blocks)),
        )
        for slot in range(num_streams)
    ]  # fmt: skip
    sequences = [SequenceStep(slot) for slot in range(num_streams)]
    runner.launch(plan_of(0, sequences, starts)).result()
    start = time.perf_counter()
    for step in range(num_output):
        runner.launch(plan_of(step + 1, sequences)).result()
    return Step((time.perf_counter() - start) / num_output, {})


def step_by_http(served: Served, num_streams: int, num_output: int) -> Step:
    workers = {name: pid for name, pid in workers_of(served.process.pid).items() if name in TOLD}
    before = {name: cpu_seconds(pid) for name, pid in workers.items()}
    options = ("--streams", str(num_streams), "--output-tokens", str(num_output))
    command = [sys.executable, "-m", "tools.bench_streams", "--put-load", served.url, *options]
    told = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    cpu = {name: (cpu_seconds(pid) - before[name]) / num_output for name, pid in workers.items()}
    return Step(told["seconds"], {**cpu, "client": told["cpu"]})


def measure(folder: Path, num_streams: int, num_output: int, rounds: int) -> None:
    dtype = name_of(choose_dtype("auto", CPU))
    cores = sorted(os.sched_getaffinity(0))
    torch.set_num_threads(len(cores))
    pairs: list[tuple[Step, Step]] = []
    options = (*ALL_CORES, "--dtype", dtype, "--max-num-seqs", str(num_streams))
    with open_runner(folder, CPU, dtype, num_streams) as runner, serve(folder, *options) as served:
        for number in range(rounds + 1):
            spread_threads(cores)
            inside = step_in_process(runner, num_streams, num_output)
            os.sched_setaffinity(0, cores)  # the client inherits them
            outside = step_by_http(served, num_streams, num_output)
            if number:  # the first one fills caches
                pairs.append((inside, outside))
    raw = [inside.seconds / outside.seconds for inside, outside in pairs]
    without = [inside.seconds / (outside.seconds - outside.cpu["client"]) for inside, outside in pairs]
    inside_s, outside_s = (
        statistics.median(step.seconds for step in steps) for steps in zip(*pairs, strict=True)
    )
    print(
        f"{num_streams} streams of {num_output} tokens, {dtype}: {1e3 * inside_s:.2f} ms a step in process, "
        f"{1e3 * outside_s:.2f} ms through HTTP: {statistics.median(raw):.3f} "
        f"({min(raw):.3f} to {max(raw):.3f}); without the client's CPU time {statistics.median(without):.3f}"
    )
    for name in (*TOLD, "client"):
        cpu = statistics.median(outside.cpu[name] for _, outside in pairs)
        print(f"{name}: {1e3 * cpu:.2f} ms of CPU a step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="0.3b", choices=SHAPES, help="of the random checkpoint")
    parser.add_argument("--model", type=Path, help="a checkpoint to measure instead")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--output-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or Path(scratch)
        if args.model is None:
            make_checkpoint(folder, args.shape)
        measure(folder, args.streams, args.output_tokens, args.rounds)


if __name__ == "__main__":
    main()
