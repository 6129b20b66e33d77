"""Sites: the addresses at which edges are bound and connected. One class for each kind; tcp is in `tcp.py`.

A process may use several sites: an LLM rank, say, serves the ViTs of its own machine in the run directory and
those of another machine over tcp.
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
    """Gives each edge its address."""

    name: str
    follows_epochs: bool  # each incarnation of a worker binds a new address
    is_authenticated: bool  # connecting peers have proven their public keys

    def url(self, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str: ...

    def open(self, context: Any) -> None:
        """Called once, with the context of all sockets."""

    def prepare(self, socket: Any) -> None:
        """Sets the options that a socket of this site needs before it binds or connects."""

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
