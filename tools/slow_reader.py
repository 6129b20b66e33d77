"""A client that stops reading: does it cost the others anything, is it cut off, and does it get its answers
all the same?

    python -m tools.slow_reader --seconds 60

A client process asks for long answers, first as a reference, then once more, and is stopped (SIGSTOP) in
their midst. Streams of another client run beside it all the time. When it goes on it must end with the very
answers of the reference.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.client.client import PipelineClient
from pipeline.wire.prompts import ChatMessage
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import Role
from tools.processes import resident_bytes, workers_of
from tools.soak import Answer, ask, difference, pipeline

SETTLE_S = 1.5
# From the second round's start to the stop: an answer has begun, and most of it is still to come. Who is not
# behind by enough messages is not cut off, and a fast machine would finish a short answer in SETTLE_S.
BEGIN_S = 0.3


async def read_slowly(run_dir: Path, num_requests: int, num_tokens: int) -> None:
    """The slow client: tells when it begins each of its two rounds, then what it found."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)

    async def answers(client: PipelineClient) -> Sequence[Answer]:
        chats = [[ChatMessage("user", f"Tell story number {number}.")] for number in range(num_requests)]
        return await asyncio.gather(*(ask(client, chat, [], sampling) for chat in chats))

    async with PipelineClient(run_dir) as client:
        print("reference", flush=True)
        expected = await answers(client)
        second_round = asyncio.create_task(answers(client))
        await asyncio.sleep(BEGIN_S)
        print("again", flush=True)
        wrong = [
            difference(answer, reference)
            for answer, reference in zip(await second_round, expected, strict=True)
        ]
        print(
            json.dumps(
                {"wrong": [words for words in wrong if words], "resubmitted": client.counters["resubmitted"]}
            ),
            flush=True,
        )


@dataclass
class Found:
    # between tokens of the neighbours
    gaps: dict[str, list[float]] = field(default_factory=lambda: {"reference": [], "stopped": []})
    cut_off_after: float = 0.0  # seconds from the stop; 0: never
    grown: int = 0  # bytes, the LLM, while the client stood still
    wrong: list[str] = field(default_factory=list)
    num_resubmitted: int = 0
    back_after: float = 0.0  # seconds from its going on to its last answer

    @property
    def longest(self) -> dict[str, float]:
        return {phase: max(gaps) for phase, gaps in self.gaps.items()}


class SlowReader:
    def __init__(self, args: argparse.Namespace, launcher: int, run_dir: Path) -> None:
        self._args, self._launcher, self._run_dir = args, launcher, run_dir
        self._max_stop_s = max(45.0, 3 * args.seconds)
        self._phase = ""  # to which the neighbours' gaps count; empty: none
        self._found = Found()

    async def run(self) -> Found:
        command = [sys.executable, "-m", "tools.slow_reader", "--child", str(self._run_dir)]
        command += ["--requests", str(self._args.requests), "--tokens", str(self._args.tokens)]
        async with PipelineClient(self._run_dir) as client, asyncio.TaskGroup() as tasks:
            neighbours = [
                tasks.create_task(self._stream(client, number)) for number in range(self._args.neighbours)
            ]
            await asyncio.sleep(SETTLE_S)
            child = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
            assert child.stdout is not None
            try:
                assert await child.stdout.readline() == b"reference\n"
                self._phase = "reference"
                assert await child.stdout.readline() == b"again\n"
                self._phase = ""
                await self._stop(client, child.pid)
                resumed = time.monotonic()
                told = json.loads(await asyncio.wait_for(child.stdout.readline(), 60 + self._max_stop_s))
            finally:
                if child.returncode is None:
                    child.kill()
                await child.wait()
                for task in neighbours:
                    task.cancel()
        self._found.back_after = time.monotonic() - resumed
        self._found.wrong, self._found.num_resubmitted = told["wrong"], told["resubmitted"]
        return self._found

    async def _stop(self, client: PipelineClient, pid: int) -> None:
        llm = workers_of(self._launcher)["llm.0"]
        before, start = resident_bytes(llm), time.monotonic()
        num_before = _num_cut_off(client)
        os.kill(pid, signal.SIGSTOP)
        self._phase = "stopped"
        # On a slow machine it takes longer until a client is so far behind.
        while (waited := time.monotonic() - start) < self._max_stop_s:
            if waited >= self._args.seconds and self._found.cut_off_after:
                break
            if not self._found.cut_off_after and _num_cut_off(client) > num_before:
                self._found.cut_off_after = waited
            await asyncio.sleep(0.1)
        self._phase = ""
        self._found.grown = resident_bytes(llm) - before
        os.kill(pid, signal.SIGCONT)

    async def _stream(self, client: PipelineClient, number: int) -> None:
        sampling = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        while True:
            last = 0.0
            async for _ in client.generate([ChatMessage("user", f"Count from {number}.")], sampling):
                now = time.monotonic()
                if last and self._phase:
                    self._found.gaps[self._phase].append(now - last)
                last = now


def _num_cut_off(client: PipelineClient) -> int:
    return sum(
        int(state.counters.get("clients_cut_off", 0))
        for state in client.workers
        if state.worker.role is Role.LLM
    )


def report(found: Found, slowdown: float) -> int:
    """Prints what was found; 0 if nothing is wrong."""
    longest = found.longest
    summary = {
        "cut off after (s)": round(found.cut_off_after, 1),
        "neighbours' gaps (ms), median and longest": {
            phase: [round(1000 * statistics.median(gaps), 1), round(1000 * max(gaps), 1)] for phase,
            gaps in found.gaps.items()
        },
        "longest gap, beside the reference's": round(longest["stopped"] / longest["reference"], 2),
        "LLM grew (MiB)": round(found.grown / 2**20, 1),
        "submitted again": found.num_resubmitted, "wrong": found.wrong,
        "last answer after going on (s)": round(found.back_after, 1),
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    is_slower = longest["stopped"] > slowdown * longest["reference"]
    return int(is_slower or not found.cut_off_after or any(words != "tie" for words in found.wrong))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="that the client stands still, and longer until it is cut off",
    )
    parser.add_argument("--requests", type=int, default=4, help="of the slow client, at once")
    parser.add_argument(
        "--tokens",
        type=int,
        default=6000,
        help="of each answer: more than may wait for it, and its reference",
    )
    parser.add_argument("--neighbours", type=int, default=4, help="streams of another client")
    parser.add_argument(
        "--slowdown", type=float, default=1.2, help="of the neighbours' longest gap, that is not too much"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.child:
        asyncio.run(read_slowly(args.child, args.requests, args.tokens))
        return 0
    with pipeline(["--dtype", "float32", *options]) as (process, run_dir, _, _):
        found = asyncio.run(SlowReader(args, process.pid, run_dir).run())
    return report(found, args.slowdown)


if __name__ == "__main__":
    sys.exit(main())
