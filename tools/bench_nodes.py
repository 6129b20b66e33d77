"""What several nodes cost and bring, by launchers on this machine that stand for nodes, with a core each.

    python -m tools.bench_nodes                                  # all parts
    python -m tools.bench_nodes --parts cost routing --rounds 3

cost        processors' time of a request with a picture on two nodes, against one node with half the load
throughput  tokens a second of four groups on two nodes, against one group; each layer of a step sleeps,
            so that cores do not decide
routing     prompt tokens that four groups compute for chats of several turns, against one group
pause       of a stream when its node's launcher is killed, against a killed LLM rank on one node; and when
            the whole node dies at once, which the head finds only after 1.5 times `--node-timeout`

The two sides of each comparison take turns; told are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.bench_serving import Result, Workload, open_session, run_load, send
from tools.local_nodes import Launchers, end_at_sigterm, launched

QUICK = ("--kv-cache-gib", "0.25", "--max-model-len", "2048")
STEPS_SLEEP = ("--fault", "llm:slow:layer:0.012")  # about 70 ms a step of the embedded model
SLOTS = 4  # requests that a group computes at once there
CHATS = Workload(num_words=64, num_output=24, num_images=1, num_turns=4)
PAUSE_TOKENS = 400


class Row(NamedTuple):
    what: str
    ours: float
    against: float
    unit: str
    beside: str = ""

    def __str__(self) -> str:
        values = (
            f"{self.ours:.4g} {self.unit} | {self.against:.4g} {self.unit} | {self.ours / self.against:.2f}"
        )
        return f"| {self.what} | {values} | {self.beside} |"


def load(
    launchers: Launchers, workload: Workload, count: int, concurrency: int, seed: int
) -> tuple[list[Result], float]:
    """The results of so many chats, and the seconds that they took. Raises RuntimeError if one failed."""
    rng = random.Random(seed)
    chats = workload.chats(count, rng)
    start = time.monotonic()
    results = asyncio.run(run_load(launchers.url, workload, chats, concurrency, 0.0, rng))
    if errors := [result.error for result in results if result.error]:
        raise RuntimeError(errors[0])
    return results, time.monotonic() - start


def take_turns(rounds: int, sides: Sequence[Callable[[int], float]]) -> list[float]:
    """The median of each side, which is called with the number of the round."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        for values, side in zip(found, sides, strict=True):
            values.append(side(number))
    return [statistics.median(values) for values in found]


def cost(folder: Path, rounds: int) -> list[Row]:
    workload = Workload(num_words=32, num_output=32, num_images=1, sizes=((336, 336),))

    def of(launchers: Launchers, num_groups: int) -> Callable[[int], float]:
        def side(number: int) -> float:
            before = sum(map(launchers.cpu_seconds, launchers.processes))
            # One stream a group: else the sizes of batches decide.
            results, _ = load(launchers, workload, 16 * num_groups, num_groups, number)
            return (sum(map(launchers.cpu_seconds, launchers.processes)) - before) / len(results)

        side(-1)  # warms up
        return side

    with launched(folder / "one", 1, *QUICK) as one, launched(folder / "two", 2, *QUICK) as two:
        ours, against = take_turns(rounds, [of(two, 2), of(one, 1)])
    return [Row("cost of a request, two nodes : one node, half the load", 1000 * ours, 1000 * against, "ms")]


def throughput(folder: Path, rounds: int) -> list[Row]:
    workload = Workload(num_words=16, num_output=48)
    options = (*QUICK, *STEPS_SLEEP, "--max-num-seqs", str(SLOTS))
    head_cpu: list[float] = []

    def of(launchers: Launchers, num_groups: int) -> Callable[[int], float]:
        def side(number: int) -> float:
            before = launchers.cpu_seconds(0)
            # Twice as many as there is room for: a group that ends one has the next.
            concurrency = 2 * SLOTS * num_groups
            results, wall = load(launchers, workload, 2 * concurrency, concurrency, number)
            if num_groups > 1:
                head_cpu.append((launchers.cpu_seconds(0) - before) / len(results))
            return sum(result.num_output_tokens for result in results) / wall

        side(-1)
        return side

    with (
        launched(folder / "one", 1, *options) as one,
        launched(folder / "two", 2, *options, "--dp", "2", groups_per_node=2) as two,
    ):
        ours, against = take_turns(rounds, [of(two, 4), of(one, 1)])
    beside = f"the head computes {1000 * statistics.median(head_cpu):.0f} ms a request"
    return [Row("throughput, four groups on two nodes : one group", ours, against, "tokens/s", beside)]


def routing(folder: Path, rounds: int) -> list[Row]:
    def of(launchers: Launchers) -> Callable[[int], float]:
        def side(number: int) -> float:
            results, _ = load(launchers, CHATS, 24, 8, number)
            return sum(result.num_prompt_tokens - result.num_cached_tokens for result in results)

        return side

    with (
        launched(folder / "one", 1, *QUICK) as one,
        launched(folder / "two", 2, *QUICK, "--dp", "2", groups_per_node=2) as two,
    ):
        ours, against = take_turns(rounds, [of(two), of(one)])
    return [Row("prompt tokens computed for chats, four groups : one", ours, against, "tokens")]


async def _pauses(url: str, count: int, kill: Callable[[], None]) -> list[float]:
    """The longest of each of `count` streams; `kill` comes when all run."""
    workload = Workload(num_words=16, num_output=PAUSE_TOKENS, wants_token_ids=True)
    chats = workload.chats(count, random.Random(time.monotonic()))
    results = [Result(sent=0.0) for _ in chats]
    async with open_session() as session:
        tasks = [
            asyncio.create_task(
                send(session, url, workload.body([{"role": "user", "content": turns[0]}]), 0, result)
            )
            for turns, result in zip(chats, results, strict=True)
        ]
        while not all(len(result.arrivals) >= PAUSE_TOKENS // 5 for result in results):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        kill()
        await asyncio.gather(*tasks)
    if errors := [result.error for result in results if result.error]:
        raise RuntimeError(errors[0])
    return [max(result.gaps) for result in results]


def pause(folder: Path, rounds: int) -> list[Row]:
    def restart(number: int) -> float:
        with launched(folder / f"one{number}", 1, *QUICK) as one:
            victim = one.workers()["llm.0"]
            return max(asyncio.run(_pauses(one.url, 4, lambda: os.kill(victim, signal.SIGKILL))))

    def death(number: int, with_all: bool) -> float:
        with launched(folder / f"two{number}{with_all}", 2, *QUICK) as two:
            return max(asyncio.run(_pauses(two.url, 4, lambda: two.kill(1, with_all))))

    of_launcher, of_machine, against = take_turns(
        rounds, [lambda number: death(number, False), lambda number: death(number, True), restart]
    )
    return [
        Row("pause, a node's launcher killed : an LLM rank on one node", of_launcher, against, "s"),
        Row("pause, a whole node killed : an LLM rank on one node", of_machine, against, "s"),
    ]


PARTS = {"cost": cost, "throughput": throughput, "routing": routing, "pause": pause}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    end_at_sigterm()
    print("| what | ours | against | ratio | |\n| --- | --- | --- | --- | --- |")
    for part in args.parts:
        with tempfile.TemporaryDirectory(prefix="bench-nodes-") as folder:
            for row in PARTS[part](Path(folder), args.rounds):
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
