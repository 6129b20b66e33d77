"""Stage times of this machine, from a server of its own under a load; and how well they predict other loads.

Needs transformers (`pip install -e '.[test]'`), as `tools.bench_engine` does.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import os
import random
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from launcher.placement import place
from pipeline.families import ModelInfo
from pipeline.wire.topology import Role, WorkerId
from tools.bench_engine import Served, raise_failed, serve
from tools.bench_serving import Result, Workload, run_load
from tools.simulation.fit import Spans, fit
from tools.simulation.load import Camera, Load, Submission
from tools.simulation.pipeline import Outcome, Settings, Simulated, Size, simulate
from tools.simulation.report import Summary, summarize, summary_of
from tools.simulation.stages import StageTimes
from tools.trace import read_spans

CPU_BATCH_PATCHES, GPU_BATCH_PATCHES = 1024, 4096  # as the server's default
SOLO = (  # one request at a time: what no other request delays
    Workload(num_words=32, num_output=16, num_images=1, sizes=((224, 224), (448, 448), (672, 672))),
    Workload(num_words=256, num_output=16),
)
# Of one size, so that each picture's size is known.
TOGETHER = Workload(num_words=64, num_output=48, num_images=1)
CONCURRENCY = 4
# What is predicted: more streams with more and other pictures, and an open loop.
CROWD = Workload(num_words=128, num_output=32, num_images=2, sizes=((224, 224), (336, 448)))
OPEN = Workload(num_words=96, num_output=64, num_images=1, sizes=((448, 448), (560, 336)))
OPEN_SHARE = 0.6  # of the rate that the measured closed loop reached
WARM_UP = 2  # requests of each kind after which a server that has just started is warm


class Run(NamedTuple):
    """A load as it was measured, with what a simulation of it needs."""

    name: str
    results: list[Result]
    load: Load

    @property
    def outcomes(self) -> list[Outcome]:
        start = self.results[0].sent
        return [
            Outcome(one.sent - start, [at - start for at in one.arrivals], one.sent - start + one.e2el)
            for one in self.results
        ]

    @property
    def summary(self) -> Summary:
        outcomes = self.outcomes
        return summary_of(
            [one.ttft for one in outcomes],
            [gap for one in outcomes for gap in one.gaps],
            sum(one.num_output_tokens for one in self.results),
            max(one.ended for one in outcomes),
        )


class Bench:
    """Sends loads to a server, and says what was sent as the simulation takes it."""

    def __init__(self, url: str, camera: Camera, seed: int) -> None:
        self._url, self._camera, self._rng = url, camera, random.Random(seed)

    def run(self, name: str, workload: Workload, count: int, concurrency: int = 0, rate: float = 0.0) -> Run:
        """The lengths of prompts are the server's, and an open loop's arrivals those that were."""
        told = dataclasses.replace(workload, wants_token_ids=True)
        chats = told.chats(count, self._rng)
        results = asyncio.run(run_load(self._url, told, chats, concurrency, rate, self._rng))
        raise_failed(results)
        submissions = []
        for number, (turns, result) in enumerate(zip(chats, results, strict=True)):
            pictures = tuple(
                self._camera.picture(*size, f"{name} {number} {index}")
                for index, size in enumerate(_sizes(turns[0]))
            )
            num_text = result.num_prompt_tokens - sum(picture.num_tokens for picture in pictures)
            at = result.sent - results[0].sent if rate else 0.0
            submissions.append(Submission(number, at, num_text, result.num_output_tokens, pictures))
        return Run(name, results, Load(submissions, concurrency))

    def warm_up(self) -> float:
        """Returns the time, by the monotonic clock, from which on all is warm."""
        for workload in (*SOLO, TOGETHER):
            self.run("warm up", workload, WARM_UP, WARM_UP)
        return time.monotonic()


def _sizes(content: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Width and height of the pictures of a message, as their PNG headers say."""
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    heads = [base64.b64decode(url.partition(",")[2][:44]) for url in urls]
    return [(int.from_bytes(head[16:20]), int.from_bytes(head[20:24])) for head in heads]


class Measured(NamedTuple):
    stages: StageTimes
    runs: list[Run]  # to which the stage times were fitted


def measure(folder: Path, info: ModelInfo, options: Sequence[str], count: int, seed: int) -> Measured:
    """Starts a server without prefix cache, and fits its stage times to what it does under two loads: one
    request at a time, and `CONCURRENCY` at a time. `count`: requests of each."""
    camera = Camera(info)
    with tempfile.TemporaryDirectory() as traces:
        with serve(folder, "--trace-dir", traces, "--no-prefix-caching", *options) as served:
            bench = Bench(served.url, camera, seed)
            begin = bench.warm_up()
            alone = [bench.run("one at a time", workload, count, 1) for workload in SOLO]
            together = bench.run(f"closed loop, {CONCURRENCY} at a time", TOGETHER, count, CONCURRENCY)
            blocks = _gauge(served, "kv_blocks"), _gauge(served, "block_size")
        found = {
            worker: [span for span in spans if span.start >= begin]
            for worker, spans in read_spans(Path(traces)).items()
        }
    spans, runs = Spans.of(found), (*alone, together)
    # Requests come in this order, but for those that are together.
    pictures = [each.pictures for run in runs for each in run.load.submissions]
    megapixels = {
        span.request_ids[0]: sum(one.megapixels for one in shown)
        for span, shown in zip(spans.prepare, pictures, strict=True)
    }
    stages = fit(spans, megapixels, takes_turns(options))
    stages = msgspec.structs.replace(
        stages, kv_blocks=blocks[0], block_size=blocks[1], model=info.folder.name,
        origin=f"measured on {os.cpu_count()} cores" + (f", options {' '.join(options)}" if options else ""),
    )  # fmt: skip
    # What no span shows: the way from the client and back.
    missing = [
        measured.ttft - simulated.ttft
        for run in alone
        for measured, simulated in zip(run.outcomes, predict(stages, info, run).outcomes, strict=True)
    ]
    front = max(0.0, statistics.median(missing))
    return Measured(msgspec.structs.replace(stages, front_s=front), [*runs])


def predict(stages: StageTimes, info: ModelInfo, run: Run) -> Simulated:
    """What the simulation says of a load that was measured."""
    patches = GPU_BATCH_PATCHES if torch.cuda.is_available() else CPU_BATCH_PATCHES
    return simulate(stages, info, Size(), Settings(vit_max_batch_patches=patches), run.load)


class Compared(NamedTuple):
    """A load: what was measured, and what the stage times predict."""

    run: Run
    is_fitted: bool
    measured: Summary
    predicted: Summary
    simulated: Simulated


class Checked(NamedTuple):
    stages: StageTimes
    loads: list[Compared]


def check(folder: Path, info: ModelInfo, options: Sequence[str], count: int, seed: int) -> Checked:
    """Measures stage times, and then, on another server, loads that they have not seen."""
    stages, runs = measure(folder, info, options, count, seed)
    rate = OPEN_SHARE * runs[-1].summary.requests_per_s
    with serve(folder, *options) as served:
        bench = Bench(served.url, Camera(info), seed + 1)
        bench.warm_up()
        unseen = [
            bench.run(
                f"closed loop, {2 * CONCURRENCY} at a time, two pictures", CROWD, count, 2 * CONCURRENCY
            ),
            bench.run(f"open loop, {rate:.1f} requests/s", OPEN, 2 * count, rate=rate),
        ]
    compared: list[Compared] = []
    for run in (*runs, *unseen):
        simulated = predict(stages, info, run)
        compared.append(Compared(run, run in runs, run.summary, summarize(simulated), simulated))
    return Checked(stages, compared)


def takes_turns(options: Sequence[str]) -> bool:
    """Whether the server's LLM and ViT take turns on this machine's cores."""
    if torch.cuda.is_available() or any(one.startswith(("--cpu-sharing", "--llm-cores")) for one in options):
        return False
    placement = place(sorted(os.sched_getaffinity(0)), 1, 1, is_elastic=True, can_take_turns=True)
    return placement[WorkerId(Role.LLM)].takes_turns


def _gauge(served: Served, name: str) -> int:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=10) as answer:
        found = re.search(rf"^vlm_{name}\{{[^}}]*\}} (\S+)$", answer.read().decode(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"the server's metrics lack vlm_{name}")
    return int(float(found[1]))
