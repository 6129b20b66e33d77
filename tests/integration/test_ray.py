"""A pipeline that Ray places: a local cluster of Ray whose nodes declare a GPU each, on this machine."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.integration.test_nodes import ask, wait_until_all_serve
from tests.servers import Server, alive_in_session, is_alive
from tools.processes import free_port

QUICK = ("--node-timeout", "2", "--kv-cache-gib", "0.1", "--max-model-len", "1024")
PLACED = re.compile(r"node (\d+) is placed on Ray's node (\w+) \(.*its actor is process (\d+)")
LAUNCHER = re.compile(r"node (\d+): its launcher is process (\d+)")
END_S = 30


class Driver(Server):
    """The driver's own process has no worker."""

    def find_workers(self) -> dict[str, int]:
        return {}

    def placed(self, rank: int) -> tuple[str, int]:
        """Where a node was placed last: Ray's node, and the actor's process."""
        found = [match for match in map(PLACED.search, list(self.lines)) if match and match[1] == str(rank)]
        return found[-1][2], int(found[-1][3])

    def count_of_head(self, text: str) -> int:
        """Lines in which the head has said so; other nodes may have said the same."""
        origin = f"pid={self.placed(0)[1]}"
        return sum(text in line and origin in line for line in list(self.lines))

    def wait_for_head(self, text: str, count: int, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while self.count_of_head(text) < count:
            assert time.monotonic() < end, f"the head has not said {text!r} {count} times:\n{self.output}"
            time.sleep(0.1)

    def launchers(self) -> list[int]:
        return [int(match[2]) for match in map(LAUNCHER.search, list(self.lines)) if match]

    def assert_nothing_left(self) -> None:
        """The launchers may not be children of this process, and have sessions of their own."""
        assert len(self.launchers()) >= 3
        end = time.monotonic() + END_S
        while left := [name for session in self.launchers() for name in alive_in_session(session)]:
            assert time.monotonic() < end, left
            time.sleep(0.1)
        # That of the other node's launcher was killed with its node: nobody could clear it.
        assert [entry.name for entry in (self.run_dir / "0").iterdir()] == ["lock"]


@contextmanager
def ray_cluster() -> Iterator[subprocess.Popen[str]]:
    """In a process of its own, as it changes the process that it is in."""
    command = [sys.executable, "-m", "tools.cluster", "--nodes", "2", "--gpus", "1"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed (the extra ray)")
def test_ray_places_nodes_and_places_them_again() -> None:
    with ray_cluster() as cluster:
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        lines = [cluster.stdout.readline().split() for _ in range(3)]
        nodes, address = {lines[0][-1], lines[1][-1]}, lines[2][-1]
        options = (
            "--placement", "ray", "--nnodes", "2", "--device", "cpu", "--ray-gpus", "1",
            "--master-port", str(free_port(2)), *QUICK,
        )  # fmt: skip
        with Driver(*options, environment={"RAY_ADDRESS": address}) as driver:
            wait_until_all_serve(driver.url, 2)
            (of_head, _), (of_other, actor) = driver.placed(0), driver.placed(1)
            assert {of_head, of_other} == nodes, "each on its own"
            said = ask(driver, 3)

            counts = {text: driver.count_of_head(text) for text in ("node 1 has joined", "llm.1 is ready")}
            os.kill(actor, signal.SIGKILL)
            for text, count in counts.items():
                driver.wait_for_head(text, count + 1)
            assert driver.placed(1)[1] != actor
            assert ask(driver, 3) == said

            launcher = driver.launchers()[-1]
            cluster.stdin.write(f"remove {of_other}\n")
            cluster.stdin.flush()
            driver.wait_for("node 1: its actor is gone", count=2)
            end = time.monotonic() + END_S
            while is_alive(launcher):
                assert time.monotonic() < end, "the launcher outlives its actor"
                time.sleep(0.1)
            assert ask(driver, 3) == said
