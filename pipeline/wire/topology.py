"""The table of the processes and of all edges between them.

A bound address carries the epoch of the process that binds it, so that a message queued for a dead process
can never reach its successor. The launcher's own edges have no epoch: the run directory belongs to one
launcher.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

MAX_IPC_PATH = 107  # bytes: sun_path of a Unix socket, less its terminator


class Role(enum.StrEnum):
    LAUNCHER = "launcher"
    API = "api"
    PREPROCESS = "preprocess"
    VIT = "vit"
    LLM = "llm"
    GATEWAY = "gateway"
    CARRIER = "carrier"  # its rank is the number of its node
    CLIENT = "client"


class WorkerId(NamedTuple):
    role: Role
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.role}.{self.rank}"


def parse_worker(name: str) -> WorkerId:
    """Of its name. Raises ValueError for another text."""
    role, _, rank = name.partition(".")
    return WorkerId(Role(role), int(rank))


class Pattern(enum.Enum):
    PUSH_PULL = "PULL binds, PUSH connects"
    PUB_SUB = "XPUB binds, SUB connects"


@dataclass(frozen=True, slots=True)
class Edge:
    name: str
    pattern: Pattern
    binder: Role
    peers: tuple[Role, ...]
    # One address for each rank of the binder; for the LLM, only for ranks that lead a group.
    per_rank: bool = False


INGEST = Edge("ingest", Pattern.PUSH_PULL, Role.PREPROCESS, (Role.API, Role.GATEWAY, Role.CLIENT))
ENCODE = Edge("encode", Pattern.PUSH_PULL, Role.VIT, (Role.PREPROCESS, Role.LLM, Role.CARRIER), per_rank=True)
FEEDBACK = Edge("feedback", Pattern.PUSH_PULL, Role.PREPROCESS, (Role.VIT, Role.LLM, Role.CARRIER))
LLM = Edge("llm", Pattern.PUSH_PULL, Role.LLM, (Role.PREPROCESS, Role.VIT, Role.CARRIER), per_rank=True)
CARRY = Edge(
    "carry", Pattern.PUSH_PULL, Role.CARRIER, (Role.CARRIER, Role.PREPROCESS, Role.VIT, Role.LLM),
    per_rank=True,
)  # fmt: skip
STEPS = Edge("steps", Pattern.PUB_SUB, Role.LLM, (Role.LLM,), per_rank=True)
OUTPUTS = Edge("outputs", Pattern.PUB_SUB, Role.LLM, (Role.API, Role.GATEWAY, Role.CLIENT), per_rank=True)
CONTROL = Edge(
    "control",
    Pattern.PUB_SUB,
    Role.LAUNCHER,
    (Role.API, Role.GATEWAY, Role.CLIENT, Role.PREPROCESS, Role.VIT, Role.LLM, Role.CARRIER),
)
STATUS = Edge(
    "status",
    Pattern.PUSH_PULL,
    Role.LAUNCHER,
    (Role.API, Role.GATEWAY, Role.PREPROCESS, Role.VIT, Role.LLM, Role.CARRIER),
)
REPORTS = Edge("reports", Pattern.PUSH_PULL, Role.LAUNCHER, (Role.LAUNCHER,))
ORDERS = Edge("orders", Pattern.PUB_SUB, Role.LAUNCHER, (Role.LAUNCHER,))
LANES = Edge("lanes", Pattern.PUSH_PULL, Role.API, (Role.PREPROCESS, Role.VIT, Role.LLM))
EDGES = (INGEST, ENCODE, FEEDBACK, LLM, STEPS, OUTPUTS, CARRY, CONTROL, STATUS, LANES, REPORTS, ORDERS)
# The edges between the launchers of several nodes, over tcp only.
NODE_EDGES = (REPORTS, ORDERS)
# The edges that clients use; the gateway binds them for clients on other machines.
DIRECT_EDGES = (CONTROL, INGEST, OUTPUTS)

# By edge: the roles whose messages to another node pass the carrier there, since they hold tensors' handles.
CARRIED = {ENCODE: Role.PREPROCESS, LLM: Role.VIT}


def socket_name(edge: Edge, rank: int, epoch: int) -> str:
    """The socket file of an edge, bound by a worker of this epoch."""
    name = f"{edge.name}.{rank}" if edge.per_rank else edge.name
    return name if edge.binder is Role.LAUNCHER else f"{name}.{epoch}"


def address(run_dir: Path, edge: Edge, epochs: Mapping[WorkerId, int], rank: int = 0) -> str:
    """The address of `edge`, given each worker's current epoch.

    Raises ValueError when the path is too long for a socket.
    """
    epoch = 0 if edge.binder is Role.LAUNCHER else epochs[WorkerId(edge.binder, rank)]
    path = str(run_dir / socket_name(edge, rank, epoch))
    if len(path.encode()) > MAX_IPC_PATH:
        raise ValueError(
            f"run_dir {str(run_dir)!r} is too long: {path!r} has {len(path.encode())} bytes, a socket path "
            f"at most {MAX_IPC_PATH}"
        )
    return f"ipc://{path}"
