"""Sites: where the two ends of an edge meet. One kind of site, one class; those of tcp are in `tcp.py`.

A process may have edges at several sites: an LLM rank, say, serves the ViTs of its own machine in the run
directory and those of another machine over tcp.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pipeline.wire.topology import Edge, WorkerId, address


class EdgeEnd(NamedTuple):
    """An edge, and the rank of the worker that binds it."""

    edge: Edge
    rank: int = 0


class Site(Protocol):
    """A place at which edges are bound, and connected to."""

    name: str
    follows_epochs: bool  # each incarnation of a worker binds another address
    is_authenticated: bool  # who connects has proven its public key

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str: ...

    def open(self, context: Any) -> None:
        """Called once, with the context of all sockets."""

    def prepare(self, socket: Any) -> None:
        """Sets what such a socket needs before it binds or connects."""

    def close(self) -> None: ...


class RunDirectory:
    """Unix sockets in the run directory of a pipeline on this machine."""

    follows_epochs = True
    is_authenticated = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
        return address(self._path, edge, epochs, rank)

    def open(self, context: Any) -> None:
        pass

    def prepare(self, socket: Any) -> None:
        pass

    def close(self) -> None:
        pass
