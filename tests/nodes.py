"""Pipelines over several nodes for tests: launchers at addresses of the loopback interface, or in network
namespaces that stand for machines."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.servers import Server
from tools import namespaces as network
from tools.local_nodes import LocalNodes
from tools.processes import workers_of


class Node(Server):
    """The launcher of a node other than the head."""

    STARTED = re.compile(r".*node (\d+) has joined")

    def find_workers(self) -> dict[str, int]:
        """None: the head orders them later."""
        return {}


class WaitingHead(Server):
    """A head that serves only once nodes have joined."""

    STARTED = re.compile(r".*launcher +(Starting)")

    def find_workers(self) -> dict[str, int]:
        """None: they may not have started."""
        return {}

    def wait_until_serving(self) -> None:
        self.wait_for("Serving at ", 120)
        line = next(line for line in self.lines if line.startswith("Serving at "))
        self.url = line.split()[2].removesuffix("/v1")
        self.children = workers_of(self.process.pid)


class Cluster:
    """Launchers that are one pipeline."""

    def __init__(
        self, folder: Path, addresses: Sequence[str], *options: str, insides: Sequence[Sequence[str]] = ()
    ):
        """`insides`: for each node the command that runs another on it. `options`: of every launcher."""
        self._nodes, self._options = LocalNodes(folder, addresses, insides), options

    def _of(self, rank: int, token: Path | None = None) -> tuple[str, ...]:
        return *self._nodes.options(rank, token), *self._options

    def head(self, *options: str) -> Server:
        return Server(*self._of(0), *options, inside=self._nodes.insides[0])

    def waiting_head(self, *options: str) -> WaitingHead:
        return WaitingHead(*self._of(0), *options, inside=self._nodes.insides[0])

    def node(
        self, rank: int, *options: str, token: Path | None = None, expects_failure: bool = False
    ) -> Node:
        inside = self._nodes.insides[rank]
        return Node(*self._of(rank, token), *options, expects_failure=expects_failure, inside=inside)


@contextlib.contextmanager
def namespaces(count: int) -> Iterator[tuple[list[str], list[list[str]]]]:
    """As `tools.namespaces`. The test is skipped where this process may not make any."""
    with contextlib.ExitStack() as opened:
        try:
            made = opened.enter_context(network.namespaces(count))
        except OSError as error:
            pytest.skip(f"network namespaces need root and iproute2: {error}")
        yield made
