"""What the lanes cost: the speed of streams with and without a page that looks, in turn, how long processors
compute for a token, and bytes a second.

python -m tools.bench_lanes --rounds 5
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import aiohttp

from launcher.checkpoints import EMBEDDED
from tools.bench_engine import serve
from tools.processes import cpu_seconds, workers_of

NUM_STREAMS = 8
SETTLING_S = 1.5  # until all workers know that somebody looks, or nobody


class Round(NamedTuple):
    tokens_per_s: float
    cpu_ms: float  # of all workers, for a token
    kb_per_s: float  # of events, while somebody looks


async def _stream(session: aiohttp.ClientSession, url: str, number: int, num_tokens: int) -> None:
    chat = [{"role": "user", "content": f"Tell me about number {number}"}]
    body = {"messages": chat, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        await response.read()


class Looker:
    """A page that only counts what it gets."""

    def __init__(self) -> None:
        self.num_bytes = 0

    @asynccontextmanager
    async def looking(self, session: aiohttp.ClientSession, url: str) -> AsyncIterator[None]:
        async with session.get(f"{url}/lanes/events") as response:
            reading = asyncio.create_task(self._count(response))
            yield
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reading

    async def _count(self, response: aiohttp.ClientResponse) -> None:
        async for data in response.content.iter_any():
            self.num_bytes += len(data)


async def _measure(
    session: aiohttp.ClientSession, url: str, num_tokens: int, looks: bool, spent_s: Callable[[], float]
) -> Round:
    looker = Looker()
    async with looker.looking(session, url) if looks else contextlib.nullcontext():
        await asyncio.sleep(SETTLING_S)
        looker.num_bytes, start, spent = 0, time.monotonic(), spent_s()
        await asyncio.gather(*(_stream(session, url, number, num_tokens) for number in range(NUM_STREAMS)))
        seconds, spent = time.monotonic() - start, spent_s() - spent
    count = NUM_STREAMS * num_tokens
    return Round(count / seconds, spent / count * 1000, looker.num_bytes / seconds / 1000)


async def compare(
    url: str, num_rounds: int, num_tokens: int, spent_s: Callable[[], float]
) -> tuple[list[Round], list[Round]]:
    """Rounds without and with a page, in turn. `spent_s`: how long the workers have computed so far."""
    without: list[Round] = []
    beside: list[Round] = []
    async with aiohttp.ClientSession() as session:
        await _measure(session, url, num_tokens, False, spent_s)  # warms up
        for number in range(num_rounds):
            for looks in (False, True) if number % 2 else (True, False):
                measured = await _measure(session, url, num_tokens, looks, spent_s)
                (beside if looks else without).append(measured)
    return without, beside


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=1000, help="of each stream")
    parser.add_argument("--model", type=Path, default=EMBEDDED / "model")
    args = parser.parse_args()
    with serve(args.model) as served:
        pids = workers_of(served.process.pid).values()
        without, beside = asyncio.run(
            compare(served.url, args.rounds, args.tokens, lambda: sum(map(cpu_seconds, pids)))
        )
    ratios = [looked.tokens_per_s / alone.tokens_per_s for alone, looked in zip(without, beside, strict=True)]
    alone = statistics.median(one.tokens_per_s for one in without)
    looked = statistics.median(one.tokens_per_s for one in beside)
    print(f"{NUM_STREAMS} streams: {alone:.1f} tokens/s, while a page looks {looked:.1f}")
    shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"ratio, round by round: {shown}; median {statistics.median(ratios):.3f}")
    for what, rounds in (("alone", without), ("while a page looks", beside)):
        print(f"processors, {what}: {statistics.median(one.cpu_ms for one in rounds):.3f} ms a token")
    print(f"events: {statistics.median(one.kb_per_s for one in beside):.2f} kB/s")


if __name__ == "__main__":
    main()
