"""Sends a server of our own mutated requests to all routes, many connections at once. Knows nothing of how
they are made (mutations.py), nor how answers are judged (answers.py).

    python -m tools.attack --kinds bodies --bodies 20000 --seed 1 --out /tmp/violations
    python -m tools.attack --replay /tmp/violations/1-4711.http

In rounds. After each, when nothing is open: a plain question must have the answer that it always has, nobody
may have been restarted, and what the processes hold is noted.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import select
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tools.answers import KEYS, Answer, violation
from tools.mutations import Mutated, make_media, mutated_request
from tools.processes import num_open_files, resident_bytes, workers_of
from tools.valid_requests import INQUIRIES, Media

ROUND = 500  # bodies
AT_ONCE = 16  # connections
ANSWER_S = 90.0  # no answer may take longer
HASTE_S = 2.0  # to answer a request whose end nobody can tell
# The server under attack. No URL leads anywhere but to this machine; a context that is soon full ends what
# asks for much.
OPTIONS = (
    "--allow-private-media",
    "--allowed-media-domains",
    "127.0.0.1",
    "--max-model-len",
    "1024",
    "--kv-cache-gib",
    "0.25",
)
QUESTION = b'{"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12, "temperature": 0}'
LEAST_ROUNDS = 8  # before anything is said of growth
GROWTH_FLOOR, MAX_GROWTH = 32 << 20, 1.1  # from the second quarter of the rounds to the last one
GRAMMAR_BYTES = 256 << 20  # that an LLM keeps of compiled grammars: thousands are filled in slowly
MORE_FILES = 8


class Connection:
    """A keep-alive connection that sends bytes as they are."""

    def __init__(self, url: str) -> None:
        host, port = url.split("/")[2].split(":")
        self._address = (host, int(port))
        self._socket: socket.socket | None = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, request: bytes, is_framed: bool = True) -> Answer:
        """After a request whose end nobody can tell, the connection ends."""
        started = time.monotonic()
        if self._socket is None:
            self._socket = socket.create_connection(self._address, ANSWER_S)
        # refused before the body was through: there is an answer all the same
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(request)
            if not is_framed and not select.select([self._socket], [], [], HASTE_S)[0]:
                self._socket.shutdown(socket.SHUT_WR)  # else the server waits for the rest of the body
        method = request.partition(b" ")[0].decode()
        response = http.client.HTTPResponse(self._socket, method=method)
        status, body, lost = 0, b"", ""
        try:
            response.begin()
            status = response.status
            body = response.read()
        except http.client.IncompleteRead as error:
            body, lost = error.partial, "the answer is cut off"
        except (OSError, http.client.HTTPException) as error:
            lost = f"{type(error).__name__}: {error}"
        finally:
            response.close()
        if lost or not is_framed or response.will_close:
            self.close()
        is_stream = status == 200 and (response.getheader("Content-Type") or "").startswith(
            "text/event-stream"
        )
        return Answer(status, body, is_stream, time.monotonic() - started, lost)


@dataclass
class Found:
    # By what came of a request: how long it took, and its number.
    seconds: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    # By method and path: how often each came.
    routes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    changes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    violations: list[str] = field(default_factory=list)
    # by process: resident bytes, open files
    holdings: list[dict[str, tuple[int, int]]] = field(default_factory=list)

    @property
    def is_fine(self) -> bool:
        return not self.violations


def question(key: str) -> bytes:
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}"
    head += "Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(QUESTION)}\r\n\r\n".encode() + QUESTION


class Sender:
    """`launcher` is the process of the server at `url`.

    Requests that are not answered as they should be go to `out`.
    """

    def __init__(self, url: str, launcher: int, seed: int, out: Path | None = None, key: str = "") -> None:
        self._url, self._launcher, self._seed, self._out, self._key = url, launcher, seed, out, key
        self._media: Media = make_media()
        self.found = Found()

    def run(self, num_bodies: int) -> Found:
        expected, restarts = self._ask(), self._restarts()
        self.found.holdings.append(self._holdings())
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, num_bodies, ROUND):
                numbers = iter(range(first, min(first + ROUND, num_bodies)))
                for _ in pool.map(self._send_all, itertools.repeat(numbers, AT_ONCE)):
                    pass
                self._look(first, expected, restarts)
        self.found.violations += growth(self.found.holdings)
        return self.found

    def _send_all(self, numbers: Iterator[int]) -> None:
        """One connection takes numbers as the others do."""
        with contextlib.closing(Connection(self._url)) as connection:
            for number in numbers:
                sent = mutated_request(self._seed, number, self._media, self._key)
                self._note(number, sent, connection.send(sent.request, sent.is_framed))

    def _note(self, number: int, sent: Mutated, answer: Answer) -> None:
        kind = "stream" if answer.is_stream else str(answer.status) if answer.status else "closed"
        self.found.seconds[kind].append((answer.seconds, number))
        self.found.routes[_route_of(sent)][kind] += 1
        for change in sent.what or ("nothing",):
            self.found.changes[change] += 1
        if wrong := violation(sent, answer):
            self.found.violations.append(f"{self._seed}-{number} ({', '.join(sent.what)}): {wrong}")
            if self._out is not None:
                (self._out / f"{self._seed}-{number}.http").write_bytes(sent.request)

    def _look(self, first: int, expected: str, restarts: dict[str, int]) -> None:
        """Between two rounds."""
        where = f"bodies {first} to {first + ROUND}"
        if (answer := self._ask()) != expected:
            self.found.violations.append(
                f"{where}: the plain question was answered with {answer!r} instead of {expected!r}"
            )
        now = self._restarts()
        if now != restarts:
            self.found.violations.append(f"{where}: restarts {now} after {restarts}")
            restarts.update(now)
        self.found.holdings.append(self._holdings())

    def _ask(self) -> str:
        with contextlib.closing(Connection(self._url)) as connection:
            answer = connection.send(question(self._key))
        if answer.status != 200:
            return f"status {answer.status} {answer.body[:200]!r} {answer.lost}"
        return str(json.loads(answer.body)["choices"][0]["message"]["content"])

    def _restarts(self) -> dict[str, int]:
        host, port = self._url.split("/")[2].split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=ANSWER_S)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {self._key}"})
            said = connection.getresponse().read().decode()
        return {
            worker: int(count)
            for worker, count in re.findall(r'vlm_worker_restarts_total\{worker="([^"]+)"\} (\d+)', said)
        }

    def _holdings(self) -> dict[str, tuple[int, int]]:
        processes = {"launcher": self._launcher, **workers_of(self._launcher)}
        return {name: (resident_bytes(pid), num_open_files(pid)) for name, pid in processes.items()}


def _route_of(sent: Mutated) -> str:
    if not sent.path:
        return "other paths"
    return "GET" if sent.path in INQUIRIES else sent.path


def growth(holdings: Sequence[dict[str, tuple[int, int]]]) -> list[str]:
    """Processes that hold more and more. The first quarter of the rounds fills caches."""
    if len(holdings) < LEAST_ROUNDS:
        return []
    quarter = len(holdings) // 4
    early, late = _most(holdings[quarter : 2 * quarter]), _most(holdings[-quarter:])
    found = []
    for name in early.keys() & late.keys():
        (bytes_before, files_before), (bytes_after, files_after) = early[name], late[name]
        kept = GRAMMAR_BYTES if name.startswith("llm.") else 0
        if bytes_after > GROWTH_FLOOR + kept + MAX_GROWTH * bytes_before:
            found.append(f"{name} grew from {bytes_before >> 20} MiB to {bytes_after >> 20} MiB")
        if files_after > files_before + MORE_FILES:
            found.append(f"{name} had {files_before} open files, has {files_after}")
    return found


def _most(holdings: Sequence[dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """The most that each process held at one of these times."""
    found: dict[str, tuple[int, int]] = {}
    for held in holdings:
        for name, (num_bytes, num_files) in held.items():
            most_bytes, most_files = found.get(name, (0, 0))
            found[name] = (max(num_bytes, most_bytes), max(num_files, most_files))
    return found


def replay(url: str, request: bytes) -> str:
    """The verdict on one request that was written to a file, and what was answered."""
    with contextlib.closing(Connection(url)) as connection:
        answer = connection.send(request)
    path = request.partition(b" ")[2].partition(b" ")[0].decode(errors="replace")
    wrong = violation(Mutated(request, True, ("replayed",), path if path in KEYS else ""), answer)
    judged = f"NOT FINE: {wrong}" if wrong else "fine"
    return f"{answer.status} in {answer.seconds:.2f} s {answer.lost}\n{answer.body[:2000]!r}\n{judged}"


def table(found: Found) -> str:
    """What was found, as Markdown."""
    total = sum(len(seconds) for seconds in found.seconds.values())
    lines = ["| answer | requests | p50 | p99 | longest | of body |", "| --- | --- | --- | --- | --- | --- |"]
    for kind, seconds in sorted(found.seconds.items()):
        ordered = sorted(seconds)
        p50, p99, longest = (
            f"{1000 * ordered[int(share * (len(ordered) - 1))][0]:.0f} ms" for share in (0.5, 0.99, 1.0)
        )
        lines.append(f"| {kind} | {len(seconds)} | {p50} | {p99} | {longest} | {ordered[-1][1]} |")
    lines += [f"| all | {total} | | | {len(found.violations)} violations | |", ""]
    lines += ["| route | answers |", "| --- | --- |"]
    for route, kinds in sorted(found.routes.items(), key=lambda one: -one[1].total()):
        lines.append(f"| {route} | {', '.join(f'{kind}: {n}' for kind, n in sorted(kinds.items()))} |")
    lines += [
        "",
        "| process | MiB at the start | after a quarter | half | all | open files, start and end |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    last = len(found.holdings) - 1
    for name, (_, files) in found.holdings[last].items():
        shown = [
            f"{found.holdings[at].get(name, (0, 0))[0] / 2**20:.0f}" for at in (0, last // 4, last // 2, last)
        ]
        lines.append(f"| {name} | {' | '.join(shown)} | {found.holdings[0].get(name, (0, 0))[1]}, {files} |")
    changed = ", ".join(
        f"{what} {count}" for what, count in sorted(found.changes.items(), key=lambda pair: -pair[1])
    )
    return "\n".join(
        [*lines, "", f"Changed: {changed}.", *(f"- {violated[:400]}" for violated in found.violations[:50])]
    )
