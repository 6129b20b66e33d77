"""Sends a server of our own what strangers send, and asks beside it, as another tenant, for a little text.

    python -m tools.attack                                # everything at full size: about half an hour
    python -m tools.attack --kinds pictures nested --size small
    python -m tools.attack --kinds bodies --bodies 20000  # see tools/mutated_bodies.py

For each kind: how long the text takes with nobody beside it, how long beside the attack (it may take three
times as long), what the attacker was answered (OpenAI's error object in every case, no 5xx but 503), and who
was restarted (nobody). Seeded and bounded; it talks to the loopback address only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import aiohttp
import zmq

from tools import hostile, mutated_bodies, mutations
from tools.answers import wrong_answer
from tools.soak import pipeline

ATTACKER, VICTIM = "attacker-key", "victim-key"
BODIES = "bodies"  # a kind of its own: tools/mutated_bodies.py
MOST_RATIO = 3.0  # of the median times, beside an attack and before
NUM_QUIET = 9
PAUSE_S = 0.3  # between the victim's requests
ANSWER_S = 300.0  # no request may take longer
START_S = 2.0  # of the attacker's process


@dataclass
class Outcome:
    """What came of one attack."""

    quiet: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.beside) / statistics.median(self.quiet)

    @property
    def is_fine(self) -> bool:
        return not self.faults and not self.restarts and self.ratio <= MOST_RATIO


class Size(NamedTuple):
    """How much of it."""

    seconds: float  # an attack is repeated for so long
    pictures: int  # at once
    connections: int
    num_quiet: int = NUM_QUIET  # requests of the victim before an attack


SIZES = {"small": Size(4.0, 2, 8), "full": Size(60.0, 8, 200)}


class Target:
    """The server under attack."""

    def __init__(
        self, url: str, run_dir: Path, session: aiohttp.ClientSession, size: Size, seed: int
    ) -> None:
        self.url, self.run_dir, self.session, self.size = url, run_dir, session, size
        self.rng = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []

    async def post(self, body: bytes, headers: dict[str, str] | None = None, key: str = ATTACKER) -> int:
        """The status; what it should not have been, or not have said, is a fault."""
        sent = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", **(headers or {})}
        try:
            async with self.session.post(f"{self.url}/chat/completions", data=body, headers=sent) as response:
                answer = await response.read()
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            # Whoever is refused before the body is through may find the connection closed.
            self.statuses[type(error).__name__] += 1
            return 0
        self.statuses[str(response.status)] += 1
        if wrong := wrong_answer(response.status, answer):
            self.faults.append(f"{wrong} to {body[:200]!r}")
        return response.status

    async def ask(self, words: str) -> float:
        """Seconds that the victim waits for a few tokens."""
        start = time.monotonic()
        body = hostile.chat(hostile.text(words), max_tokens=8, ignore_eos=True)
        if (status := await self.post(json.dumps(body).encode(), key=VICTIM)) != 200:
            self.faults.append(f"the victim was answered with {status}")
        return time.monotonic() - start

    async def restarts(self) -> dict[str, int]:
        headers = {"Authorization": f"Bearer {VICTIM}"}
        async with self.session.get(f"{self.url.removesuffix('/v1')}/metrics", headers=headers) as response:
            found = re.findall(r'vlm_worker_restarts_total\{worker="([^"]+)"\} (\d+)', await response.text())
        return {worker: int(count) for worker, count in found}


Attack = Callable[[Target], Awaitable[None]]


async def _repeat(target: Target, at_once: int, send: Callable[[int], Awaitable[object]]) -> None:
    end = time.monotonic() + target.size.seconds

    async def one(index: int) -> None:
        while time.monotonic() < end:
            await send(index)
            await asyncio.sleep(0.01)

    await asyncio.gather(*(one(index) for index in range(at_once)))


async def pictures(target: Target) -> None:
    """Pictures that are small to send and long to read."""
    is_full = target.size.seconds > 10
    side, mib = (6000, 12) if is_full else (2000, 1)
    made = [
        (hostile.jpeg_of_scans(side, 2000 if is_full else 300), "image/jpeg"),
        (hostile.jpeg_of_segments(mib << 20), "image/jpeg"),
        (hostile.png_of_chunks(mib << 20), "image/png"),
        (hostile.large_png(8000 if is_full else 3000), "image/png"),
        (hostile.rle_bitmap(5000 if is_full else 1000), "image/bmp"),
    ]

    async def send(index: int) -> None:
        data, kind = target.rng.choice(made)
        # No cache is to have it.
        part = hostile.picture_part(data + target.rng.randbytes(8), kind)
        await target.post(json.dumps(hostile.chat(part, hostile.text("What is it?"))).encode())

    await _repeat(target, target.size.pictures, send)


async def compressed(target: Target) -> None:
    """Bodies that inflate to a thousand times their length, with a key and without."""
    bomb = hostile.inflating(64 << 20 if target.size.seconds < 10 else 1 << 30)

    async def send(index: int) -> None:
        await target.post(bomb, {"Content-Encoding": "gzip"}, ATTACKER if index % 2 else "nobody")

    await _repeat(target, target.size.pictures, send)


async def nested(target: Target) -> None:
    """Messages deeper than a decoder's stack, to every PULL socket in the run directory."""
    context = zmq.Context()
    places = [
        path for path in target.run_dir.iterdir() if path.is_socket() and path.name.split(".")[0] in PULLS
    ]
    sockets = [context.socket(zmq.PUSH) for _ in places]
    for place, socket in zip(places, sockets, strict=True):
        socket.linger = 0
        socket.connect(f"ipc://{place}")
    try:
        end = time.monotonic() + target.size.seconds
        while time.monotonic() < end:
            for socket in sockets:
                for message in hostile.nested_messages(target.rng, 5):
                    try:
                        socket.send(message, zmq.DONTWAIT)
                        target.statuses["sent"] += 1
                    except zmq.Again:  # its queue is full
                        target.statuses["not taken"] += 1
            await asyncio.sleep(0.02)
    finally:
        context.destroy(linger=0)


PULLS = ("ingest", "encode", "feedback", "llm", "status")


async def slow_bodies(target: Target) -> None:
    """Connections that send their head or their body for ever, and bodies whose end never comes."""
    host, port = target.url.split("/")[2].split(":")
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {ATTACKER}\r\n"
    begun = (
        (head + "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n").encode().replace(b"{}", b"%d")
    )
    most = 60 << 20 if target.size.seconds > 10 else 4 << 20
    end = time.monotonic() + target.size.seconds

    async def one(index: int) -> None:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
            if index % 3 == 0:
                writer.write(head.encode())
            elif index % 3 == 1:
                writer.write(begun % 1000)
            elif index % 15 == 2:
                writer.write(begun % most + b" " * (most - 1))
            while time.monotonic() < end:
                writer.write(b"a: b\r\n" if index % 3 == 0 else b" ")
                await asyncio.wait_for(writer.drain(), 5)
                await asyncio.sleep(0.5)
            writer.close()
            target.statuses["held"] += 1
        except (OSError, TimeoutError):
            target.statuses["closed"] += 1

    await asyncio.gather(*(one(index) for index in range(target.size.connections)))


async def crowd(target: Target) -> None:
    """More requests of one tenant than the server takes, long ones, with pictures, of the highest
    priority."""

    async def send(index: int) -> None:
        parts = [hostile.picture_part(hostile.png(target.rng)) for _ in range(index % 3)]
        body = hostile.chat(
            *parts, hostile.text(f"Tell {target.rng.random()}"), max_tokens=200, ignore_eos=True
        )
        if index % 4 == 0:
            body["priority"] = -(2**31)
        await target.post(json.dumps(body).encode())

    await _repeat(target, 4 * target.size.connections, send)


async def silent_hosts(target: Target) -> None:
    """URLs of hosts that accept and never answer."""
    hosts = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
    port = hosts.sockets[0].getsockname()[1]

    async def send(index: int) -> None:
        urls = [f"http://127.0.0.1:{port}/{target.rng.random()}.png" for _ in range(60)]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        await target.post(json.dumps(hostile.chat(*parts)).encode())

    await _repeat(target, target.size.pictures, send)
    hosts.close()


async def mutated(target: Target) -> None:
    """Requests with something wrong. Whether each is answered rightly: `bodies`."""
    media = mutations.make_media()

    async def send(index: int) -> None:
        await target.post(mutations.mutated_body(target.rng, media, []))

    await _repeat(target, 4, send)


KINDS: dict[str, Attack] = {
    "pictures": pictures, "compressed": compressed, "nested": nested, "slow-bodies": slow_bodies,
    "crowd": crowd,
    "silent-hosts": silent_hosts, "mutated": mutated,
}  # fmt: skip


def _attacker(name: str, url: str, run_dir: Path, size: Size, seed: int, end: Connection) -> None:
    """The process of the attacker.

    On another machine it would take no time of the server's cores: here it takes what is left.
    """
    os.nice(19)

    async def main() -> Target:
        async with _session() as session:
            target = Target(url, run_dir, session, size, seed)
            try:
                await asyncio.wait_for(KINDS[name](target), ANSWER_S)
            except TimeoutError:
                target.faults.append(f"the attacker was not answered within {ANSWER_S:.0f} s")
            return target

    target = asyncio.run(main())
    end.send((target.statuses, target.faults))


def _session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


async def attack(name: str, url: str, run_dir: Path, size: Size, seed: int) -> Outcome:
    """One kind, against a server that is there for nothing else."""
    outcome = Outcome()
    async with _session() as session:
        victim = Target(url, run_dir, session, size, seed)
        before = await victim.restarts()
        for number in range(size.num_quiet + 1):
            seconds = await victim.ask(f"Say hello {number}.")
            if number:  # the first warms up
                outcome.quiet.append(seconds)
            await asyncio.sleep(PAUSE_S)
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        attacker = spawn.Process(target=_attacker, args=(name, url, run_dir, size, seed, theirs))
        attacker.start()
        theirs.close()  # so that our end is at its end when the attacker is
        await asyncio.sleep(START_S)
        while not ours.poll() or len(outcome.beside) < 3:
            outcome.beside.append(await victim.ask(f"Say hi {len(outcome.beside)}."))
            await asyncio.sleep(PAUSE_S)
        try:
            outcome.statuses, outcome.faults = ours.recv()
        except EOFError:
            outcome.faults.append("the attacker's process has died")
        outcome.faults += victim.faults
        attacker.join()
        after = await victim.restarts()
        outcome.restarts = [worker for worker, count in after.items() if count != before.get(worker)]
    return outcome


def report(name: str, outcome: Outcome) -> None:
    quiet, beside = statistics.median(outcome.quiet), statistics.median(outcome.beside)
    answers = ", ".join(f"{status}: {count}" for status, count in sorted(outcome.statuses.items()))
    verdict = "fine" if outcome.is_fine else "NOT FINE"
    print(
        f"| {name} | {1000 * quiet:.0f} ms | {1000 * beside:.0f} ms | {outcome.ratio:.2f} | "
        f"{1000 * max(outcome.beside):.0f} ms "
        f"| {len(outcome.beside)} | {answers} | {', '.join(outcome.restarts) or 'nobody'} | {verdict} |",
        flush=True,
    )
    for fault in outcome.faults[:10]:
        print(fault[:400], file=sys.stderr)


def run(kinds: Sequence[str], size: Size, seed: int, options: Sequence[str]) -> dict[str, Outcome]:
    """Each kind against a server of its own."""
    found: dict[str, Outcome] = {}
    for name in kinds:
        more = [
            "--api-key",
            ATTACKER,
            VICTIM,
            "--allowed-media-domains",
            "127.0.0.1",
            *(["--allow-private-media"] if name == "silent-hosts" else []),
            *options,
        ]
        with pipeline(more) as served:
            url = served.url
            found[name] = asyncio.run(attack(name, url, served.run_dir, size, seed))
        report(name, found[name])
    return found


def run_bodies(num_bodies: int, seed: int, out: Path | None, options: Sequence[str]) -> bool:
    """Mutated bodies, against a server of their own; whether nothing was wrong."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with pipeline([*mutated_bodies.OPTIONS, *options]) as served:
        found = mutated_bodies.Sender(served.url, served.process.pid, seed, out).run(num_bodies)
    found.violations += [
        f"a worker said: {line}" for line in served.lines if "Traceback" in line or "AssertionError" in line
    ]
    print(mutated_bodies.table(found), flush=True)
    return found.is_fine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, BODIES], default=[*KINDS, BODIES])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bodies", type=int, default=20_000, help="how many mutated ones")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where mutated requests are kept that were not answered as they should be",
    )
    parser.add_argument(
        "--replay", type=Path, metavar="FILE", help="sends one of them again, and nothing else"
    )
    args, options = parser.parse_known_args()
    if args.replay is not None:
        with pipeline([*mutated_bodies.OPTIONS, *options]) as served:
            print(mutated_bodies.replay(served.url, args.replay.read_bytes()))
        return 0
    is_fine = True
    if kinds := [kind for kind in args.kinds if kind != BODIES]:
        print(
            "| what | text, quiet | beside | ratio | longest | asked | answers to the attacker | restarted "
            "| |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
        found = run(kinds, SIZES[args.size], args.seed, options)
        is_fine = all(outcome.is_fine for outcome in found.values())
    if BODIES in args.kinds:
        is_fine &= run_bodies(args.bodies, args.seed, args.out, options)
    return int(not is_fine)


if __name__ == "__main__":
    sys.exit(main())
