"""Launchers on this machine that are one pipeline, as if each ran on a machine of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.announcement import SERVING
from tools.processes import children_of, cpu_seconds, free_port, workers_of

LOOPBACK = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
START_S, STOP_S = 120.0, 60.0


class LocalNodes:
    """What makes launchers one pipeline: their options, and the command that runs each at its place."""

    def __init__(self, folder: Path, addresses: Sequence[str], insides: Sequence[Sequence[str]] = ()) -> None:
        """`insides`: for each node the command that runs another on it."""
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.addresses = addresses
        cores = sorted(os.sched_getaffinity(0))
        # One core each: nodes that share cores wait for each other's threads.
        self.insides = [
            [*inside, "taskset", "-c", str(cores[rank % len(cores)])]
            for rank, inside in enumerate(insides or [()] * len(addresses))
        ]
        self._options = (
            "--nnodes", str(len(addresses)), "--master-addr", addresses[0],
            "--master-port", str(free_port(2)),
        )  # fmt: skip

    def options(self, rank: int, token: Path | None = None) -> tuple[str, ...]:
        """`token`: another than that of all."""
        if len(self.addresses) == 1:
            return ()
        return (
            *self._options, "--node-rank", str(rank), "--node-address", self.addresses[rank],
            "--node-token-file", str(token or self.token),
        )  # fmt: skip


class Launchers:
    """A pipeline over `LocalNodes`; close it at the end."""

    def __init__(self, folder: Path, nodes: LocalNodes, *options: str) -> None:
        """`options`: of every launcher."""
        self.nodes, self._folder, self._options = nodes, folder, options
        self.processes: dict[int, subprocess.Popen[bytes]] = {}  # by rank
        self.url = ""  # of the endpoint, without /v1

    def run_dir(self, rank: int) -> Path:
        return self._folder / f"run{rank}"

    def log(self, rank: int) -> str:
        return (self._folder / f"log{rank}").read_text()

    def start(self, rank: int, *options: str) -> None:
        """Returns when the head serves, or the other node has joined. Raises RuntimeError if it does not."""
        command = [
            *self.nodes.insides[rank], sys.executable, "-m", "launcher", "--port", "0",
            "--run-dir", str(self.run_dir(rank)), *self.nodes.options(rank), *self._options, *options,
        ]  # fmt: skip
        before = self.log(rank).count("has joined") if (self._folder / f"log{rank}").exists() else 0
        with open(self._folder / f"log{rank}", "a") as log:
            self.processes[rank] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + START_S
        while not self._has_started(rank, before):
            if self.processes[rank].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"node {rank} did not start:\n{self.log(rank)[-3000:]}")
            time.sleep(0.02)

    def _has_started(self, rank: int, num_joined_before: int) -> bool:
        if rank:
            return self.log(rank).count("has joined") > num_joined_before
        said = next(filter(None, map(SERVING.match, self.log(0).splitlines())), None)
        self.url = said[1] if said else ""
        return said is not None

    def workers(self) -> dict[str, int]:
        """Process ids of the workers on all nodes, by name."""
        found: dict[str, int] = {}
        for rank in self.processes:
            with contextlib.suppress(ValueError, OSError):  # it is down, or just starts
                found |= workers_of(self.processes[rank].pid)
        return found

    def kill(self, rank: int, with_all: bool = False) -> None:
        """SIGKILL for the launcher; `with_all`: for everything of the node, as when its machine dies."""
        launcher = self.processes.pop(rank)
        others = [pid for pid, _ in children_of(launcher.pid)] + list(workers_of(launcher.pid).values())
        launcher.kill()
        for pid in others if with_all else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait()

    def cpu_seconds(self, rank: int) -> float:
        """Of all living processes of a node."""
        launcher = self.processes[rank].pid
        return cpu_seconds(launcher) + sum(map(cpu_seconds, workers_of(launcher).values()))

    def close(self) -> None:
        for rank in sorted(self.processes, reverse=True):
            self.processes[rank].send_signal(signal.SIGINT)
            self.processes[rank].wait(STOP_S)
        self.processes.clear()


def metrics(url: str) -> str:
    """Of the endpoint at `url`, without /v1."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        text: str = answer.read().decode()
        return text


def wait_until_all_serve(url: str, num_groups: int) -> None:
    """Until so many groups have reported to the endpoint. Raises RuntimeError if they do not."""
    end = time.monotonic() + START_S
    while (found := metrics(url).count("\nvlm_prompt_tokens_total{")) != num_groups:
        if time.monotonic() > end:
            raise RuntimeError(f"{found} groups serve, not {num_groups}")
        time.sleep(0.1)


def end_at_sigterm() -> None:
    """So that no launchers are left when a tool is stopped by its time limit."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextlib.contextmanager
def launched(folder: Path, count: int, *options: str, groups_per_node: int = 1) -> Iterator[Launchers]:
    """`count` nodes, of which all groups serve."""
    folder.mkdir(exist_ok=True)
    launchers = Launchers(folder, LocalNodes(folder, LOOPBACK[:count]), *options)
    try:
        for rank in range(count):
            launchers.start(rank)
        wait_until_all_serve(launchers.url, count * groups_per_node)
        yield launchers
    finally:
        launchers.close()
