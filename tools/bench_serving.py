"""Load on OpenAI endpoints, and what users feel of it: TTFT, ITL, TPOT, E2EL, throughput and goodput, defined
as `vllm bench serve` does.

    python -m tools.bench_serving --num-prompts 64 --concurrency 8               # closed loop
    python -m tools.bench_serving --num-prompts 64 --request-rate 4              # open loop, Poisson
    python -m tools.bench_serving --images 3 --image-size 224x224,448x448 --turns 2
    python -m tools.bench_serving --base-url http://HOST:8000 http://HOST:9000 --rounds 3

The last line asks two servers in turn, and tells their ratio.

TTFT: sent to first output. ITL: gaps between streamed events, pooled. TPOT: (E2EL - TTFT) / (output tokens -
1) of a request. E2EL: sent to last byte. Goodput: requests a second that keep all the limits of `--goodput`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image

from tools.plots import Bar, Line, bars, color_of, height_of_bars, lines, page, shares

WORDS = [
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "star",
    "cross",
    "ring",
    "left",
    "right",
    "top",
    "bottom",
    "shape",
    "picture",
    "number",
]
METRICS = ("ttft", "tpot", "itl", "e2el")
TABLE = (
    "output_tokens_per_s",
    "goodput",
    "ttft_ms.median",
    "ttft_ms.p99",
    "tpot_ms.median",
    "itl_ms.p99",
    "e2el_ms.median",
)


@dataclass
class Result:
    """One request: times in seconds, from `sent` on."""

    sent: float
    turn: int = 0
    ttft: float = 0.0
    e2el: float = 0.0
    arrivals: list[float] = field(default_factory=list)  # of streamed events
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def tpot(self) -> float | None:
        return (self.e2el - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def keeps(self, limits: dict[str, float]) -> bool:
        """Whether it is within the limits, in seconds.

        A request of one token has no TPOT and counts as 0 there.
        """
        worst = {
            "ttft": self.ttft,
            "tpot": self.tpot or 0.0,
            "itl": max(self.gaps, default=0.0),
            "e2el": self.e2el,
        }
        return not self.error and all(worst[name] <= limit for name, limit in limits.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Chats of random words and noise. Pictures are distinct, or drawn from `num_shared_images`."""

    num_words: int = 256
    num_output: int = 64
    num_images: int = 0
    sizes: tuple[tuple[int, int], ...] = ((448, 448),)
    num_shared_images: int = 0
    num_turns: int = 1
    temperature: float = 0.0
    # Each token then is an event, also one without text: the bytes of a character come in several tokens.
    wants_token_ids: bool = False

    def chats(self, count: int, rng: random.Random) -> list[list[list[dict[str, Any]]]]:
        """For each chat the content of the user's turns; the pictures stand in the first."""
        shared = [self._picture(rng) for _ in range(self.num_shared_images)]
        return [[self._turn(rng, shared, turn) for turn in range(self.num_turns)] for _ in range(count)]

    def _turn(self, rng: random.Random, shared: Sequence[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
        text = {"type": "text", "text": " ".join(rng.choices(WORDS, k=self.num_words))}
        if turn:
            return [text]
        return [*(rng.choice(shared) if shared else self._picture(rng) for _ in range(self.num_images)), text]

    def _picture(self, rng: random.Random) -> dict[str, Any]:
        width, height = rng.choice(self.sizes)
        pixels = np.random.default_rng(rng.getrandbits(63)).integers(
            0, 256, (height, width, 3), dtype=np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        return {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()},
        }

    def body(self, messages: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "messages": list(messages), "max_tokens": self.num_output, "ignore_eos": True,
            "temperature": self.temperature, "stream": True,
            "stream_options": {"include_usage": True},
            **({"return_token_ids": True} if self.wants_token_ids else {}),
        }  # fmt: skip


Body = dict[str, Any] | bytes  # of JSON, encoded before where the time that takes would be seen


async def send(
    session: aiohttp.ClientSession, url: str, body: Body, turn: int = 0, result: Result | None = None
) -> Result:
    """`result` is filled as events come."""
    result = result or Result(sent=0.0)
    result.sent, result.turn = time.perf_counter(), turn
    try:
        await _receive(session, url, body, result)
    except (aiohttp.ClientError, OSError) as error:
        result.error = f"{type(error).__name__}: {error}"
    return result


async def _receive(session: aiohttp.ClientSession, url: str, body: Body, result: Result) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url.rstrip('/')}/v1/chat/completions", data=data, headers=headers) as response:
        if response.status != 200:
            result.error = f"{response.status} {await response.text()}"
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                result.error = event["error"]["message"]
                return
            if usage := event.get("usage"):
                result.num_prompt_tokens, result.num_output_tokens = (
                    usage["prompt_tokens"],
                    usage["completion_tokens"],
                )
                result.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get(
                    "cached_tokens"
                ) or 0
            for choice in event["choices"][:1]:
                text = choice["delta"].get("content") or ""
                if text or choice.get("token_ids"):
                    result.arrivals.append(time.perf_counter())
                result.text += text
    result.e2el = time.perf_counter() - result.sent
    if not result.num_prompt_tokens:
        result.error = "the stream ended without its usage"
    result.ttft = result.arrivals[0] - result.sent if result.arrivals else result.e2el


async def converse(
    session: aiohttp.ClientSession, url: str, workload: Workload, turns: Sequence[list[dict[str, Any]]]
) -> list[Result]:
    """The turns of one chat, each with the server's own answers before it. Ends at the first error."""
    messages: list[dict[str, Any]] = []
    results: list[Result] = []
    for turn, content in enumerate(turns):
        messages.append({"role": "user", "content": content})
        results.append(await send(session, url, workload.body(messages), turn))
        if results[-1].error:
            break
        messages.append({"role": "assistant", "content": results[-1].text})
    return results


def open_session() -> aiohttp.ClientSession:
    """Without limits of its own on connections and time."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0)
    )


async def run_load(
    url: str,
    workload: Workload,
    chats: Sequence[list[list[dict[str, Any]]]],
    concurrency: int,
    request_rate: float,
    rng: random.Random,
) -> list[Result]:
    """Closed loop with `concurrency` chats at a time, or open loop with Poisson arrivals at `request_rate`
    chats a second."""
    gate = asyncio.Semaphore(concurrency or len(chats))
    async with open_session() as session:

        async def one(turns: list[list[dict[str, Any]]]) -> list[Result]:
            async with gate:
                return await converse(session, url, workload, turns)

        tasks: list[asyncio.Task[list[Result]]] = []
        for turns in chats:
            if request_rate and tasks:
                await asyncio.sleep(rng.expovariate(request_rate))
            tasks.append(asyncio.create_task(one(turns)))
        return [result for results in await asyncio.gather(*tasks) for result in results]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, median, P99 and maximum in milliseconds."""
    if not values:
        return {}
    ms = np.array(values) * 1000
    return {
        "mean": float(ms.mean()),
        "median": float(np.median(ms)),
        "p99": float(np.percentile(ms, 99)),
        "max": float(ms.max()),
    }


def summarize(results: Sequence[Result], wall: float, limits: dict[str, float]) -> dict[str, Any]:
    good = [result for result in results if not result.error]
    turns = sorted({result.turn for result in good})
    return {
        "completed": len(good),
        "failed": len(results) - len(good),
        "wall_s": wall,
        "request_throughput": len(good) / wall,
        "goodput": sum(result.keeps(limits) for result in results) / wall,
        "output_tokens_per_s": sum(r.num_output_tokens for r in good) / wall,
        "total_tokens_per_s": sum(r.num_output_tokens + r.num_prompt_tokens for r in good) / wall,
        "cached_prompt_tokens": sum(r.num_cached_tokens for r in good)
        / max(1, sum(r.num_prompt_tokens for r in good)),
        "ttft_ms": spread([r.ttft for r in good]),
        "tpot_ms": spread([r.tpot for r in good if r.tpot is not None]),
        "itl_ms": spread([gap for r in good for gap in r.gaps]),
        "e2el_ms": spread([r.e2el for r in good]),
        "ttft_ms_by_turn": [spread([r.ttft for r in good if r.turn == turn]) for turn in turns],
        "errors": sorted({r.error for r in results if r.error}),
    }


def print_summary(summary: dict[str, Any]) -> None:
    for name in (
        "completed",
        "failed",
        "wall_s",
        "request_throughput",
        "goodput",
        "output_tokens_per_s",
        "total_tokens_per_s",
        "cached_prompt_tokens",
    ):
        print(f"{name:22} {summary[name]:.2f}")
    by_turn = summary["ttft_ms_by_turn"]
    rows = [(f"{name}_ms", summary[f"{name}_ms"]) for name in METRICS]
    rows += (
        [(f"ttft_ms, turn {turn + 1}", row) for turn, row in enumerate(by_turn)] if len(by_turn) > 1 else []
    )
    for name, row in rows:
        print(f"{name:22} " + "  ".join(f"{key} {value:.1f}" for key, value in row.items()))
    for error in summary["errors"][:3]:
        print("error:", error[:300])


def pick(summary: dict[str, Any], path: str) -> float:
    name, _, part = path.partition(".")
    return float((summary[name].get(part, float("nan"))) if part else summary[name])


def print_ratios(urls: Sequence[str], rounds: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and what each server has in units of the first one."""
    medians = {
        url: {path: statistics.median(pick(summary, path) for summary in rounds[url]) for path in TABLE}
        for url in urls
    }
    print("| | " + " | ".join(urls) + " | " + " | ".join(f"{url} : {urls[0]}" for url in urls[1:]) + " |")
    print("| --- |" + " --- |" * (2 * len(urls) - 1))
    for path in TABLE:
        values = [medians[url][path] for url in urls]
        ratios = [value / values[0] if values[0] else float("nan") for value in values[1:]]
        print(
            f"| {path} | "
            + " | ".join(f"{value:.1f}" for value in values)
            + " | "
            + " | ".join(f"{ratio:.2f}" for ratio in ratios)
            + " |"
        )
    return medians


PANEL = (620, 340)  # of the plot


def plot(by_server: Mapping[str, Sequence[Result]], rounds: Mapping[str, Sequence[dict[str, Any]]]) -> str:
    """An SVG of the last round: ITL over time, a line a stream, of each server; the distributions of TTFT and
    ITL; and of all rounds the figures of the table."""
    width, height = PANEL
    streams = {
        url: [result for result in results if len(result.arrivals) > 1] for url, results in by_server.items()
    }
    panels = [(f"Inter-token latency, ms over s: {url}", _gaps(found)) for url, found in streams.items()]
    good = {url: [result for result in results if not result.error] for url, results in by_server.items()}
    panels.append(
        (
            "Time to first token: % of requests over ms",
            [Line(url, shares([1000 * one.ttft for one in found])) for url, found in good.items()],
        )
    )
    panels.append(
        (
            "Inter-token latency: % of gaps over ms",
            [
                Line(url, shares([1000 * gap for one in found for gap in one.gaps]))
                for url, found in good.items()
            ],
        )
    )
    drawn: list[str] = []
    for number, (title, series) in enumerate(panels):
        drawn += lines(title, series, number % 2 * width, number // 2 * height, width, height)
    top = -(-len(panels) // 2) * height
    tall = height_of_bars(len(rounds))
    for number, path in enumerate(TABLE):
        values = [
            _bar(url, [pick(summary, path) for summary in found], color_of(place))
            for place, (url, found) in enumerate(rounds.items())
        ]
        drawn += bars(path, values, 10 + number % 2 * width, top + number // 2 * tall, width - 20, 220)
    return page(2 * width, top + -(-len(TABLE) // 2) * tall, drawn)


def _gaps(streams: Sequence[Result]) -> list[Line]:
    start = min((result.sent for result in streams), default=0.0)
    return [
        Line("", [
            (at - start, 1000 * gap) for at, gap in zip(result.arrivals[1:], result.gaps, strict=True)
        ])
        for result in streams
    ]  # fmt: skip


def _bar(url: str, values: Sequence[float], color: str) -> Bar:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Bar(url, None)
    return Bar(url, statistics.median(known), min(known), max(known), color)


def parse_limits(given: Sequence[str]) -> dict[str, float]:
    """`ttft:500` and the like, in ms, as seconds by name. Raises ValueError for another name."""
    limits: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition(":")
        if name not in METRICS:
            raise ValueError(f"goodput knows {', '.join(METRICS)}, not {name!r}")
        limits[name] = float(value) / 1000
    return limits


def parse_sizes(given: str) -> tuple[tuple[int, int], ...]:
    pairs = [size.split("x") for size in given.split(",")]
    return tuple((int(width), int(height)) for width, height in pairs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url", nargs="+", default=["http://127.0.0.1:8000"], help="several are measured in turn"
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="each with a load of its own, the same for all servers"
    )
    parser.add_argument("--num-prompts", type=int, default=32, help="chats in a round")
    parser.add_argument(
        "--concurrency", type=int, default=0, help="closed loop: chats at a time (default: all)"
    )
    parser.add_argument("--request-rate", type=float, default=0.0, help="open loop: arrivals a second")
    parser.add_argument(
        "--input-words", type=int, default=256, help="words of text in a turn; about as many tokens"
    )
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--images", type=int, default=0, help="pictures in a chat")
    parser.add_argument(
        "--image-size",
        type=parse_sizes,
        default=((448, 448),),
        help="WIDTHxHEIGHT, or several with commas, drawn from",
    )
    parser.add_argument(
        "--shared-images",
        type=int,
        default=0,
        help="draw the pictures from so many (default: all are distinct)",
    )
    parser.add_argument("--turns", type=int, default=1, help="questions in a chat")
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits, such as ttft:500 itl:100"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument(
        "--plot", type=Path, help="write an SVG: ITL over time, distributions, and the figures of all servers"
    )
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    limits = parse_limits(args.goodput)
    workload = Workload(
        num_words=args.input_words, num_output=args.output_tokens, num_images=args.images,
        sizes=args.image_size,
        num_shared_images=args.shared_images, num_turns=args.turns,
    )  # fmt: skip
    rounds: dict[str, list[dict[str, Any]]] = {url: [] for url in args.base_url}
    latest: dict[str, list[Result]] = {}
    for number in range(args.rounds):
        chats = workload.chats(args.num_prompts, random.Random(args.seed + number))
        for url in args.base_url:
            rng = random.Random(args.seed + number)
            start = time.perf_counter()
            results = asyncio.run(run_load(url, workload, chats, args.concurrency, args.request_rate, rng))
            rounds[url].append(summarize(results, time.perf_counter() - start, limits))
            print(f"\n{url}, round {number + 1} of {args.rounds}")
            print_summary(rounds[url][-1])
            latest[url] = results
    if args.plot:
        args.plot.write_text(plot(latest, rounds))
    medians = print_ratios(args.base_url, rounds) if len(args.base_url) > 1 else {}
    if args.json:
        args.json.write_text(json.dumps({"rounds": rounds, "medians": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
