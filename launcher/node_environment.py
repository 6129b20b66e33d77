"""Which node of several this launcher is, as whatever started it says in the environment. Pure.

Three starters of nodes are read. Each names the number of nodes, this node's rank and the head:

- LeaderWorkerSet of Kubernetes: `LWS_GROUP_SIZE`, `LWS_WORKER_INDEX`, `LWS_LEADER_ADDRESS`. Its controller
  sets all three in each container.
- Slurm: the step's variables where `srun` has set them (`SLURM_STEP_NUM_NODES`, `SLURM_STEP_NODELIST`), else
  the job's (`SLURM_JOB_NUM_NODES` or `SLURM_NNODES`, `SLURM_JOB_NODELIST` or `SLURM_NODELIST`), and
  `SLURM_NODEID`. The head is the first host of the list. `SLURM_LAUNCH_NODE_IPADDR` is not read: it is the
  host on which `srun` was called, which may be a login node.
- torchrun, and what sets the same variables (Kubeflow's PyTorchJob, scripts): `MASTER_ADDR`, `MASTER_PORT`,
  and `GROUP_RANK` with `GROUP_WORLD_SIZE`, which only torchrun sets, or `RANK` with `WORLD_SIZE`.

What was decided where they say too little or too much:

- **One node is no cluster.** Where a source says that there is one node, the answer is None.
- **Leftovers of a shell.** torchrun's names have no prefix, and shells keep them from other work. Without
  another source they count only if they place this process in a world of several. A single one of the four is
  ignored, and so are `MASTER_ADDR` and `MASTER_PORT` without a rank and a size. Any other part of the four is
  refused, since a node that should have joined would else serve alone.
- **One launcher a node.** Several processes a node (`LOCAL_WORLD_SIZE`, `SLURM_STEP_NUM_TASKS`) are refused.
- **torchrun's port.** Its agent listens on `MASTER_PORT` itself where `TORCHELASTIC_USE_AGENT_STORE` is True:
  the head needs another, so the port is None. LeaderWorkerSet and Slurm name no port: `MASTER_PORT` is taken
  where it is set beside them, as batch scripts do. The head uses the port and the one above it.
- **Conflicts** are refused: sources, and variables beside a source, must agree on size and rank. Of addresses
  only what can differ without a mistake may differ: a host's name and its number, or a short name and the
  full one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MAX_PORT = 65534  # the head listens on the port above, too
LWS = ("LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS")
ADDRESS, PORT = "MASTER_ADDR", "MASTER_PORT"
AGENT_LISTENS = "TORCHELASTIC_USE_AGENT_STORE"
REMEDY = (
    "give --nnodes, --node-rank and --master-addr (of one node: --nnodes 1), or set these variables right"
)
_BRACKETS = re.compile(r"\[([^\[\]]*)\]")
_RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


class Node(NamedTuple):
    nnodes: int  # two or more
    node_rank: int  # 0: the head
    master_addr: str
    master_port: int | None  # None: the environment names none that the head could listen on
    source: str  # for the log: LeaderWorkerSet, Slurm or torchrun


class _Source(NamedTuple):
    """What one starter says; the names are of the variables that said it."""

    name: str
    size: int
    size_name: str
    rank: int
    rank_name: str
    address: str
    address_name: str


def read_node(environment: Mapping[str, str]) -> Node | None:
    """Which node this is; None: the environment names no other nodes.

    Raises ValueError, in a sentence that names the variables, where they are incomplete, out of range, or
    contradict each other.
    """
    found = [source for source in (_leader_worker_set(environment), _slurm(environment)) if source]
    torch = _torch(environment, is_alone=not found)
    sources = [*found, *([torch] if torch else [])]
    for source in sources[1:]:
        _agree(sources[0], source)
    if found and torch is None:
        _agree_with_parts(found[0], environment)
    if not sources or sources[0].size == 1:
        return None
    first = sources[0]
    # What a script says explicitly goes before what is derived from a list of hosts.
    address = environment.get(ADDRESS, "") or first.address
    return Node(first.size, first.rank, address, _port(environment), first.name)


def first_host(hosts: str) -> str:
    """The first host of a list in Slurm's syntax: `rack[1-2]node[01-04,09],login` gives `rack1node01`.

    Raises ValueError for a list that is none.
    """
    depth, end = 0, len(hosts)
    for place, character in enumerate(hosts):
        depth += (character == "[") - (character == "]")
        if not 0 <= depth <= 1:
            raise ValueError(f"{hosts!r} is no list of hosts: its brackets do not match")
        if character == "," and not depth:
            end = place
            break
    if depth:
        raise ValueError(f"{hosts!r} is no list of hosts: its brackets do not match")

    def first_number(found: re.Match[str]) -> str:
        if _RANGES.fullmatch(found[1]) is None:
            raise ValueError(f"{hosts!r} is no list of hosts: {found[0]!r} is no range of numbers")
        return re.split("[-,]", found[1])[0]

    host = _BRACKETS.sub(first_number, hosts[:end])
    if not host or any(character.isspace() for character in host):
        raise ValueError(f"{hosts!r} is no list of hosts")
    return host


def _leader_worker_set(environment: Mapping[str, str]) -> _Source | None:
    if not any(environment.get(name) for name in LWS):
        return None
    _need(environment, LWS, "LeaderWorkerSet")
    size, rank, address = LWS
    return _source("LeaderWorkerSet", environment, size, rank, environment[address], address)


def _slurm(environment: Mapping[str, str]) -> _Source | None:
    is_step = bool(environment.get("SLURM_STEP_NUM_NODES"))
    sizes = ("SLURM_STEP_NUM_NODES",) if is_step else ("SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    lists = ("SLURM_STEP_NODELIST",) if is_step else ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
    size_name, list_name, rank_name = (
        _first_set(environment, sizes),
        _first_set(environment, lists),
        "SLURM_NODEID",
    )
    if not environment.get(size_name):
        return None  # a shell's settings of Slurm's commands, as SLURM_CONF
    num_nodes = _number(environment, size_name, 1)
    if num_nodes == 1:
        return _Source("Slurm", 1, size_name, 0, rank_name, "", list_name)
    _need(environment, (size_name, rank_name, list_name), "Slurm (start each launcher by srun)")
    if environment.get("SLURM_STEP_NUM_TASKS"):
        num_tasks = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
        if num_tasks != num_nodes:
            raise ValueError(
                f"Slurm starts {num_tasks} tasks on {num_nodes} nodes (SLURM_STEP_NUM_TASKS, {size_name}), "
                "but each node needs one launcher: srun --ntasks-per-node=1"
            )
    try:
        head = first_host(environment[list_name])
    except ValueError as error:
        raise ValueError(f"{list_name}: {error}") from None
    return _source("Slurm", environment, size_name, rank_name, head, list_name)


def _torch(environment: Mapping[str, str], is_alone: bool) -> _Source | None:
    """`is_alone`: there is no other source, so that a part of the variables is refused."""
    size_name, rank_name = _torch_names(environment)
    names = (ADDRESS, PORT, size_name, rank_name)
    given = [name for name in names if environment.get(name)]
    if environment.get(size_name) and _number(environment, size_name, 1) == 1:
        return _Source("torchrun", 1, size_name, 0, rank_name, "", ADDRESS) if is_alone else None
    if len(given) < len(names):
        is_leftover = len(given) < 2 or set(given) == {ADDRESS, PORT}
        if not is_alone or (is_leftover and not environment.get("TORCHELASTIC_RUN_ID")):
            return None
        _need(environment, names, "torchrun")
    num_local = _number(environment, "LOCAL_WORLD_SIZE", 1) if environment.get("LOCAL_WORLD_SIZE") else 1
    if num_local > 1:
        raise ValueError(
            f"{num_local} processes are started on each node (LOCAL_WORLD_SIZE), but each node needs one "
            "launcher: torchrun --nproc-per-node 1"
        )
    return _source("torchrun", environment, size_name, rank_name, environment[ADDRESS], ADDRESS)


def _torch_names(environment: Mapping[str, str]) -> tuple[str, str]:
    """Of nodes, as torchrun sets them, or of processes."""
    is_torchrun = environment.get("GROUP_RANK") or environment.get("GROUP_WORLD_SIZE")
    return ("GROUP_WORLD_SIZE", "GROUP_RANK") if is_torchrun else ("WORLD_SIZE", "RANK")


def _source(
    name: str, environment: Mapping[str, str], size_name: str, rank_name: str, address: str, address_name: str
) -> _Source:
    size = _number(environment, size_name, 1)
    rank = _number(environment, rank_name, 0)
    if rank >= size:
        raise ValueError(f"{rank_name} is {rank}, but {size_name} is {size}: ranks begin at 0; {REMEDY}")
    return _Source(name, size, size_name, rank, rank_name, address, address_name)


def _agree(one: _Source, other: _Source) -> None:
    for what, ours, theirs, our_name, their_name in (
        ("number of nodes", one.size, other.size, one.size_name, other.size_name),
        ("rank of this node", one.rank, other.rank, one.rank_name, other.rank_name),
    ):
        if ours != theirs:
            raise ValueError(
                f"the {what} is {ours} by {one.name} ({our_name}), but {theirs} by {other.name} "
                f"({their_name}): {REMEDY}"
            )
    if one.size > 1 and not _may_be_one_host(one.address, other.address):
        raise ValueError(
            f"the head is {one.address} by {one.name} ({one.address_name}), but {other.address} by "
            f"{other.name} ({other.address_name}): {REMEDY}"
        )


def _agree_with_parts(source: _Source, environment: Mapping[str, str]) -> None:
    """Variables of torchrun's that a script has set beside another source."""
    size_name, rank_name = _torch_names(environment)
    _agree(source, _Source(
        "the environment",
        _number(environment, size_name, 1) if environment.get(size_name) else source.size, size_name,
        _number(environment, rank_name, 0) if environment.get(rank_name) else source.rank, rank_name,
        environment.get(ADDRESS) or source.address, ADDRESS,
    ))  # fmt: skip


def _may_be_one_host(one: str, other: str) -> bool:
    """A name and a number may be one host's, unless the number is every host's own."""
    if one == other:
        return True
    numbers = [_numeric(host) for host in (one, other)]
    if all(numbers):
        return numbers[0] == numbers[1]
    if any(numbers):
        return not any(number is not None and number.is_loopback for number in numbers)
    short, long = sorted((one, other), key=len)
    return long.startswith(f"{short}.")


def _numeric(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _port(environment: Mapping[str, str]) -> int | None:
    if not environment.get(PORT) or environment.get(AGENT_LISTENS) == "True":
        return None
    return _number(environment, PORT, 1, MAX_PORT)


def _need(environment: Mapping[str, str], names: Sequence[str], source: str) -> None:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        there = ", ".join(name for name in names if name not in missing)
        raise ValueError(
            f"of the variables of {source} there are {there}, but not {', '.join(missing)}: {REMEDY}"
        )


def _first_set(environment: Mapping[str, str], names: Sequence[str]) -> str:
    return next((name for name in names if environment.get(name)), names[0])


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    text = environment[name]
    if (
        not (text.isascii() and text.isdecimal())
        or int(text) < least
        or (most is not None and int(text) > most)
    ):
        limits = f"from {least}" + ("" if most is None else f" to {most}")
        raise ValueError(f"{name} must be a whole number {limits}, got {text!r}")
    return int(text)
