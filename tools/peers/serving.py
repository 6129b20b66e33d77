"""Starts a server, waits until it is healthy, and leaves nothing of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tools.peers.adapters import Limits, Peer
from tools.peers.usage import all_stats, tree_of
from tools.processes import free_port

START_TIMEOUT_S = 900
STOP_TIMEOUT_S = 30
ASK_S = 0.05  # between two questions whether it is healthy
LOG_CHARS = 3000  # of its log that are told when it ends


class RunningServer(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def wait_until_healthy(self) -> None:
        """Raises RuntimeError when the server ends, or takes too long."""
        end = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(self.url):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{self.tail()}")
            time.sleep(ASK_S)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_CHARS:]


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:  # an HTTPError is one, too
        return False


@contextlib.contextmanager
def running(peer: Peer, model: Path, limits: Limits, log: Path) -> Iterator[RunningServer]:
    """The server's first process leads a session: all that it starts is known by it."""
    port = free_port()
    environment = {**os.environ, **peer.environment(limits)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            peer.command(model, port, limits), cwd=peer.folder or log.parent, env=environment,
            stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            yield RunningServer(process, f"http://127.0.0.1:{port}", log)
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """By Ctrl-C, then by force, with all that it started."""
    tree = tree_of(process.pid, all_stats())
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for pid in tree & all_stats().keys():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
