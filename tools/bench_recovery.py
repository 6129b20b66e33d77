"""What a death costs those who wait: pauses of streams, extra time of requests, restarts.

python -m tools.bench_recovery                     # the embedded model on this machine
python -m tools.bench_recovery --tp 2 --rounds 5   # other options go to the launcher
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from pipeline.client.client import PipelineClient
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from tools.processes import workers_of
from tools.soak import pipeline, png

NUM_STREAMS = 4
QUIET_S = 11.0  # between kills: a worker that died soon after its start is held back
STOPPED_S = 0.2  # a ViT stands still for so long before it is killed, so that the request is certainly there


class Row(NamedTuple):
    what: str
    seconds: float
    beside: str
    reference: float

    def __str__(self) -> str:
        ratio = self.seconds / self.reference
        return (
            f"| {self.what} | {self.seconds:.3f} s | {self.beside} | {self.reference:.3f} s | {ratio:.2f} |"
        )


class Recovery:
    def __init__(self, launcher: int, client: PipelineClient, rounds: int, num_output: int) -> None:
        self._launcher, self._client, self._rounds, self._num_output = launcher, client, rounds, num_output
        self._rng = random.Random(1)
        self._last_kill = 0.0
        self.restarts: dict[str, list[float]] = {}

    async def rows(self) -> list[Row]:
        await self._stream()
        return [
            *await self._vit_and_others(),
            await self._vit_and_its_own(),
            *await self._llm(),
            *await self._all(),
        ]

    async def _stream(self, kill: str = "") -> float:
        """The longest gap between two tokens of one stream."""
        sampling = SamplingParams(temperature=0, max_tokens=self._num_output, ignore_eos=True)
        longest, last, restart = 0.0, 0.0, None
        text = f"Tell me about number {self._rng.random()}"
        async for piece in self._client.generate([ChatMessage("user", text)], sampling):
            now = time.monotonic()
            longest = max(longest, now - last) if last else 0.0
            last = now
            if kill and piece.num_output_tokens == self._num_output // 3:
                restart = asyncio.create_task(self._kill(kill))
        if restart is not None:
            await restart
        return longest

    async def _first_token(self, picture: bytes) -> float:
        start = time.monotonic()
        messages = [ChatMessage("user", (ImagePart(frame=0), TextPart("What is it?")))]
        async for _ in self._client.generate(
            messages, SamplingParams(temperature=0, max_tokens=1), [picture]
        ):
            return time.monotonic() - start
        raise AssertionError("no token came")

    def _has_successor(self, victim: str, epoch: int) -> bool:
        return any(
            str(state.worker) == victim and state.epoch > epoch and state.is_ready
            for state in self._client.workers
        )

    async def _kill(self, victim: str) -> float:
        """Seconds until its successor serves."""
        epoch = next(state.epoch for state in self._client.workers if str(state.worker) == victim)
        start = self._last_kill = time.monotonic()
        os.kill(workers_of(self._launcher)[victim], signal.SIGKILL)
        while not self._has_successor(victim, epoch):  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        self.restarts.setdefault(victim, []).append(time.monotonic() - start)
        return time.monotonic() - start

    async def _rest(self) -> None:
        await asyncio.sleep(max(0.0, self._last_kill + QUIET_S - time.monotonic()))

    async def _vit_and_others(self) -> list[Row]:
        """Streams that need no ViT, with and without its death beside them."""

        async def streams(kill: str) -> float:
            gaps = await asyncio.gather(self._stream(kill), *(self._stream() for _ in range(NUM_STREAMS - 1)))
            return max(gaps)

        alone, beside = await self._alternate(lambda: streams(""), lambda: streams("vit.0"))
        return [
            Row(
                "ViT killed: longest pause of streams that do not need it",
                beside,
                "the same streams, nobody killed",
                alone,
            )
        ]

    async def _alternate(
        self, first: Callable[[], Awaitable[float]], second: Callable[[], Awaitable[float]]
    ) -> tuple[float, float]:
        found: tuple[list[float], list[float]] = ([], [])
        for _ in range(self._rounds):
            await self._rest()
            found[0].append(await first())
            found[1].append(await second())
        return statistics.median(found[0]), statistics.median(found[1])

    async def _vit_and_its_own(self) -> Row:
        """A request whose picture the ViT holds when it dies: it stands still first, so that there is no
        doubt."""

        async def undisturbed() -> float:
            return await self._first_token(png(self._rng))

        async def killed() -> float:
            os.kill(workers_of(self._launcher)["vit.0"], signal.SIGSTOP)
            task = asyncio.create_task(self._first_token(png(self._rng)))
            await asyncio.sleep(STOPPED_S)
            restarts.append(await self._kill("vit.0"))
            return await task - STOPPED_S

        restarts: list[float] = []
        once, again = await self._alternate(undisturbed, killed)
        return Row(
            "ViT killed: extra time of a request whose picture it had",
            again - once,
            "restart and one request",
            statistics.median(restarts) + once,
        )

    async def _llm(self) -> list[Row]:
        async def first_token() -> float:
            start = time.monotonic()
            prompt = [ChatMessage("user", f"Tell me about number {self._rng.random()}")]
            async for _ in self._client.generate(prompt, SamplingParams(temperature=0, max_tokens=1)):
                pass
            return time.monotonic() - start

        prefill, pause = await self._alternate(first_token, lambda: self._stream("llm.0"))
        return [
            Row(
                "LLM rank killed: pause of a running stream",
                pause,
                "restart and one prefill",
                statistics.median(self.restarts["llm.0"]) + prefill,
            )
        ]

    async def _all(self) -> list[Row]:
        for victim in ("preprocess.0", "vit.0", "api.0"):
            for _ in range(self._rounds):
                await self._rest()
                await self._kill(victim)
        return [
            Row(f"restart of {name}", statistics.median(times), "longest", max(times))
            for name, times in sorted(self.restarts.items())
        ]


async def measure(launcher: int, run_dir: Path, rounds: int, num_output: int) -> list[Row]:
    async with PipelineClient(run_dir) as client:
        return await Recovery(launcher, client, rounds, num_output).rows()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-tokens", type=int, default=600)
    args, options = parser.parse_known_args()
    with pipeline(options) as (process, run_dir, _, _):
        rows = asyncio.run(measure(process.pid, run_dir, args.rounds, args.output_tokens))
    print("| what | median | beside | median | ratio |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
