"""Load, and `kill -9` beside it: proves that no request is lost, none is answered twice, and nothing is left
behind.

    python -m tools.soak --minutes 10 --seed 1                    # preprocess, ViTs, LLM ranks in turn and at
    random python -m tools.soak --minutes 10 --victims none              # no kills: does anything grow?
    python -m tools.soak --tp 2 --minutes 5 --victims llm.0 vit.1 python -m tools.soak --over-tcp --victims
    gateway llm vit     # all clients but one come by the gateway

First every chat runs once, undisturbed: that is the reference. Then streams run the same chats over and over,
in random order, while workers are killed. Every answer must be the reference's, token by token; the one
excuse is a tie: at the first difference the reference's two likeliest tokens were less than 1e-3 apart. At
the end the pipeline must hold what it held at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.client.client import PipelineClient
from pipeline.transport.keys import make_client_keys, make_server_keys
from pipeline.wire.clients import TokenLogprobs
from pipeline.wire.errors import RequestError
from pipeline.wire.prompts import ChatMessage, ImagePart, TextPart
from pipeline.wire.sampling import SamplingParams
from pipeline.wire.topology import DIRECT_EDGES
from tools.processes import free_port, num_open_files, resident_bytes, workers_of
from tools.tiny_model.scenes import draw, make_scene

TIE = 1e-3
HELD = ("leases", "free_blocks", "free_slots", "free_snapshots")  # counters of workers
SETTLE_S = 3.0  # until what is over is given back and told: statistics and lease sets go once a second
RETURN_S = 60.0  # in which a worker serves again
MAX_GROWTH = 1.25  # of a worker's resident memory
READER_FILES = 6  # of two reading processes, which start when they are needed: two pipes and an inbox each
GROWTH_FLOOR = 32 << 20  # bytes that do not count as growth: what was imported or touched for the first time
QUESTIONS = (
    "What is in this picture?",
    "Which colour has it?",
    "How many shapes are there?",
    "Where is it?",
    "Describe the picture.",
)
TEXTS = (
    "Hello",
    "Tell me a story about a ship.",
    "Count to twenty.",
    "What can you do?",
    "Write a poem, please.",
)


class Turn(NamedTuple):
    question: str
    pictures: tuple[bytes, ...]


class Chat(NamedTuple):
    turns: tuple[Turn, ...]
    sampling: SamplingParams


@dataclass
class Answer:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str = ""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    longest_gap: float = 0.0  # between two of its tokens

    def is_tie(self, index: int) -> bool:
        """Whether the two likeliest tokens at this place are equally likely, as far as rounding lets one
        see."""
        if index >= len(self.logprobs):
            return False
        _, best, second = np.frombuffer(self.logprobs[index].logprobs, dtype="<f4")[:3]
        return bool(best - second < TIE)


def make_chats(count: int, rng: random.Random, num_output: int) -> list[Chat]:
    """Text only, one picture, two pictures; up to three turns; greedy and sampled; with a stop string, with
    penalties."""
    chats = []
    for number in range(count):
        turns = []
        for turn in range(rng.randint(1, 3)):
            num_pictures = rng.choice((0, 1, 2)) if turn == 0 else rng.choice((0, 0, 1))
            pictures = tuple(png(rng) for _ in range(num_pictures))
            turns.append(Turn(rng.choice(QUESTIONS if pictures or turn else TEXTS), pictures))
        options: dict[str, Any] = {
            "max_tokens": rng.randint(num_output // 4, num_output),
            "ignore_eos": True,
            "logprobs": 2,
        }
        if number % 3 == 1:
            options |= {"temperature": 0.8, "top_p": 0.9, "seed": rng.getrandbits(32)}
        else:
            options["temperature"] = 0.0
        if number % 4 == 2:
            options |= {"presence_penalty": 0.3, "repetition_penalty": 1.1}
        if number % 5 == 3:
            options["stop"] = ("the",)
        chats.append(Chat(tuple(turns), SamplingParams(**options)))
    return chats


def png(rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    size = rng.choice(((112, 112), (140, 112), (224, 168), (336, 336)))
    draw(make_scene(rng), size).save(buffer, "PNG")
    return buffer.getvalue()


def _message(turn: Turn, media: list[bytes]) -> ChatMessage:
    first = len(media)
    media += turn.pictures
    return ChatMessage(
        "user",
        (*(ImagePart(frame=first + index) for index in range(len(turn.pictures))), TextPart(turn.question)),
    )


async def ask(
    client: PipelineClient, messages: Sequence[ChatMessage], media: list[bytes], sampling: SamplingParams
) -> Answer:
    answer, last = Answer(), 0.0
    async for piece in client.generate(messages, sampling, list(media)):
        now = time.monotonic()
        if last:
            answer.longest_gap = max(answer.longest_gap, now - last)
        last = now
        answer.text += piece.text
        answer.token_ids += piece.token_ids
        answer.logprobs += piece.logprobs
        answer.num_prompt_tokens, answer.num_output_tokens = piece.num_prompt_tokens, piece.num_output_tokens
        answer.finish_reason = str(piece.finish_reason or "")
    return answer


def difference(answer: Answer, reference: Answer) -> str:
    """What is wrong with an answer: empty, "tie", or a sentence."""
    if answer.token_ids != reference.token_ids:
        pairs = zip(answer.token_ids, reference.token_ids, strict=False)
        index = next(
            (i for i, (ours, theirs) in enumerate(pairs) if ours != theirs),
            min(len(answer.token_ids), len(reference.token_ids)),
        )
        if reference.is_tie(index):
            return "tie"
        return f"token {index} of {len(reference.token_ids)} differs ({len(answer.token_ids)} came)"
    for name in ("text", "finish_reason", "num_prompt_tokens", "num_output_tokens"):
        if getattr(answer, name) != getattr(reference, name):
            return f"{name} is {getattr(answer, name)!r}, not {getattr(reference, name)!r}"
    if len(answer.logprobs) != len(answer.token_ids):
        return f"{len(answer.logprobs)} logprobs for {len(answer.token_ids)} tokens"
    return ""


@dataclass
class Findings:
    num_answers: int = 0
    num_ties: int = 0
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    # seconds from a kill until the worker serves again
    restarts: dict[str, list[float]] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)  # the longest of each answer
    num_resubmitted: int = 0
    left: list[str] = field(default_factory=list)  # what is not as it was


class Soak:
    def __init__(
        self, args: argparse.Namespace, launcher: int, run_dir: Path, remote: tuple[str, Path] | None = None
    ) -> None:
        """`remote`: address and keys, for all clients but the first."""
        self._args, self._launcher, self._run_dir, self._remote = args, launcher, run_dir, remote
        self._rng = random.Random(args.seed)
        self._chats = make_chats(args.chats, self._rng, args.output_tokens)
        self._references: list[list[Answer]] = []
        self.found = Findings()
        self.num_workers = 0  # that serve when the load begins
        self._has_killed_enough = False

    async def run(self) -> Findings:
        places = [(self._run_dir, None)] + [self._remote or (self._run_dir, None)] * (self._args.clients - 1)
        clients = [PipelineClient(place, keys) for place, keys in places]
        for client in clients:
            await client.start()
        for chat in self._chats:
            self._references.append([answer async for answer in self._play(clients[0], chat, None)])
        await self.prepare()
        for client in clients:  # warms up what a first load makes grow
            await asyncio.gather(
                *(
                    self._check(client, number)
                    for number in range(len(self._chats) if self._remote else min(4, len(self._chats)))
                )
            )
        before = await self._holdings(clients[0])
        self.num_workers = sum(state.is_ready for state in clients[0].workers)
        end = time.monotonic() + 60 * self._args.minutes
        streams = [
            asyncio.create_task(self._stream(clients[index % len(clients)], index, end))
            for index in range(self._args.streams)
        ]
        killer = asyncio.create_task(self._kill(clients[0], end))
        done = asyncio.gather(*streams)
        try:
            await asyncio.wait_for(done, 60 * self._args.minutes + self._args.patience)
        except TimeoutError:
            self.found.wrong.append(
                f"{sum(client.num_open for client in clients)} requests did not end within "
                f"{self._args.patience:.0f} s"
            )
        await killer
        self.found.num_resubmitted = sum(client.counters["resubmitted"] for client in clients)
        after = await self._holdings(clients[0])
        self._compare(before, after)
        for client in clients:
            await client.close()
        return self.found

    async def _play(self, client: PipelineClient, chat: Chat, references: Sequence[Answer] | None) -> Any:
        """The answers of a chat, turn by turn; the history is the reference's, so that one difference stays
        one."""
        messages: list[ChatMessage] = []
        media: list[bytes] = []
        for number, turn in enumerate(chat.turns):
            messages.append(_message(turn, media))
            answer = await ask(client, messages, media, chat.sampling)
            yield answer
            messages.append(ChatMessage("assistant", (references[number] if references else answer).text))

    async def _check(self, client: PipelineClient, number: int) -> None:
        chat, references = self._chats[number], self._references[number]
        try:
            turn = 0
            async for answer in self._play(client, chat, references):
                self.found.num_answers += 1
                self.found.gaps.append(answer.longest_gap)
                wrong = difference(answer, references[turn])
                self.found.num_ties += wrong == "tie"
                if wrong and wrong != "tie":
                    self.found.wrong.append(f"chat {number}, turn {turn}: {wrong}")
                turn += 1
        except RequestError as error:
            self.found.wrong.append(f"chat {number}, turn {turn}: {error.info.status} {error.info.message}")

    async def _stream(self, client: PipelineClient, index: int, end: float) -> None:
        rng = random.Random(f"{self._args.seed}/{index}")
        while time.monotonic() < end and not self._has_killed_enough:
            await self._check(client, rng.randrange(len(self._chats)))

    async def _kill(self, client: PipelineClient, end: float) -> None:
        """The victims in turn, then at random."""
        victims = self.victims([str(state.worker) for state in client.workers])
        for number in range(10**9 if victims else 0):
            pause = self._args.interval * self._rng.uniform(0.5, 1.5)
            if time.monotonic() + pause + 5 > end:
                return
            await asyncio.sleep(pause)
            victim = victims[number] if number < len(victims) else self._rng.choice(victims)
            await self.strike(client, victim)
            if 0 < self._args.kills <= self.found.kills.total():
                self._has_killed_enough = True
                return

    async def prepare(self) -> None:
        """Between the reference and the load."""

    def pids(self) -> dict[str, int]:
        """Of workers, by name."""
        return workers_of(self._launcher)

    def victims(self, names: list[str]) -> list[str]:
        """`names`: of all workers."""
        return [
            name
            for name in names
            if name.rpartition(".")[0] in self._args.victims or name in self._args.victims
        ]

    async def strike(self, client: PipelineClient, victim: str) -> None:
        """Kills a worker, and waits until it serves again."""
        pid = self.pids().get(victim)
        if pid is None:
            return  # it is down already
        epoch = next(state.epoch for state in client.workers if str(state.worker) == victim)
        start = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self.found.kills[victim] += 1
        while not any(
            str(state.worker) == victim and state.epoch > epoch and state.is_ready for state in client.workers
        ):
            await asyncio.sleep(0.01)
            if time.monotonic() - start > RETURN_S:
                self.found.wrong.append(f"{victim} did not come back within {RETURN_S:.0f} s")
                return
        self.found.restarts.setdefault(victim.rpartition(".")[0], []).append(time.monotonic() - start)

    async def _holdings(self, client: PipelineClient) -> dict[str, dict[str, int]]:
        """What each worker holds when nothing is open, and all are there again: a node whose link was cut may
        begin anew after the link is up."""
        end = time.monotonic() + RETURN_S
        while True:
            await asyncio.sleep(SETTLE_S)
            pids = self.pids()
            are_there = all(state.is_ready and str(state.worker) in pids for state in client.workers)
            if are_there or time.monotonic() > end:
                break
        held: dict[str, dict[str, int]] = {}
        for state in client.workers:
            name = str(state.worker)
            held[name] = {key: int(state.counters[key]) for key in HELD if key in state.counters}
            held[name] |= {"open": state.num_open_requests}
            if name in pids:
                held[name] |= {"rss": resident_bytes(pids[name]), "files": num_open_files(pids[name])}
        return held

    def _compare(self, before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> None:
        for name, held in before.items():
            for what, value in held.items():
                now = after[name].get(what, -1)
                more_files = 2 + (READER_FILES if name.startswith("preprocess") else 0)
                is_fine = (
                    GROWTH_FLOOR + MAX_GROWTH * value >= now > 0
                    if what == "rss"
                    else now <= value + more_files
                    if what == "files"
                    else now == value
                )
                if not is_fine:
                    self.found.left.append(f"{name}: {what} was {value}, is {now}")


class Served(NamedTuple):
    """A pipeline of our own; `lines` holds at its end what it has said of importance."""

    process: subprocess.Popen[str]
    run_dir: Path
    lines: list[str]
    url: str  # ends in /v1


@contextmanager
def pipeline(options: Sequence[str]) -> Iterator[Served]:
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run_dir = Path(folder) / "run"
        command = [
            sys.executable,
            "-m",
            "launcher",
            "--port",
            "0",
            "--run-dir",
            str(run_dir),
            "--log-level",
            "warning",
            *options,
        ]
        with (
            open(Path(folder) / "log", "w+") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            assert process.stdout is not None
            lines: list[str] = []
            try:
                said = next((line for line in process.stdout if line.startswith("Serving at")), "")
                if not said:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read()}")
                yield Served(process, run_dir, lines, said.split()[2])
            except BaseException:
                log.seek(0)
                print(log.read()[-3000:], file=sys.stderr)
                raise
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
                log.seek(0)
                lines += log.read().splitlines()


def report(found: Findings, lines: Sequence[str]) -> int:
    """Prints what was found; 0 if nothing is wrong."""
    bad = [
        line
        for line in lines
        if any(word in line for word in ("Traceback", "AssertionError", "does not stop"))
    ]
    summary = {
        "answers": found.num_answers, "wrong": len(found.wrong), "ties": found.num_ties,
        "kills": dict(found.kills),
        "resubmitted": found.num_resubmitted, "longest gap (s)": round(max(found.gaps, default=0.0), 2),
        "restart (s), median and longest": {
            role: [round(statistics.median(times), 2), round(max(times), 2)] for role,
            times in found.restarts.items()
        },
        "left": found.left, "complaints of workers": bad[:5],
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    for line in found.wrong[:20]:
        print(line)
    return int(bool(found.wrong or found.left or bad))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, ["preprocess", "vit", "llm"])
    parser.add_argument("--over-tcp", action="store_true", help="all clients but the first come by a gateway")
    args, options = parser.parse_known_args()
    options = ["--dtype", "float32", "--max-attempts", "5", *options]
    remote: tuple[str, Path] | None = None
    with tempfile.TemporaryDirectory(prefix="soak-keys-") as folder:
        if args.over_tcp:
            keys, port = Path(folder) / "keys", free_port(len(DIRECT_EDGES))
            make_server_keys(keys)
            remote = f"tcp://127.0.0.1:{port}", make_client_keys(keys, "soak")
            options += ["--direct-port", str(port), "--direct-keys", str(keys)]
        with pipeline(options) as (process, run_dir, lines, _):
            found = asyncio.run(Soak(args, process.pid, run_dir, remote).run())
    return report(found, lines)


def add_arguments(parser: argparse.ArgumentParser, victims: list[str]) -> None:
    """`victims`: the default ones."""
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--kills", type=int, default=0, help="after so many it ends before the time; 0: never"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--streams", type=int, default=16, help="chats at once")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--chats", type=int, default=30, help="different ones")
    parser.add_argument("--output-tokens", type=int, default=80, help="at most, of an answer")
    parser.add_argument(
        "--victims",
        nargs="+",
        default=victims,
        help="roles or workers; none: nobody is killed (default: %(default)s)",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=4.0,
        help="seconds between a worker's return and the next kill, on average",
    )
    parser.add_argument(
        "--patience", type=float, default=120.0, help="seconds that the last requests may take to end"
    )


if __name__ == "__main__":
    sys.exit(main())
