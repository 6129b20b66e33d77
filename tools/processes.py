"""The processes of a pipeline that runs on this machine, and what they hold."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from pipeline.process.titles import SERVER, name_of


def workers_of(pid: int) -> dict[str, int]:
    """Worker processes of a launcher by name, such as "vit.0"; the fork server by "server"."""
    (server,) = [child for child, name in children_of(pid) if name == SERVER]
    # a worker that has just been forked still has the server's name, and one that is being reaped has none
    workers = {name: child for child, name in children_of(server)}
    return {SERVER: server, **{name: child for name, child in workers.items() if name not in ("", SERVER)}}


def children_of(pid: int) -> list[tuple[int, str]]:
    """Process ids and names, such as "witness"; empty: no process of a pipeline."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [(int(child), _name(int(child))) for child in children]


def _name(pid: int) -> str:
    try:
        return name_of(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident_bytes(pid: int) -> int:
    return 1024 * int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def cpu_seconds(pid: int) -> float:
    """That all threads of a process have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11:13]) / os.sysconf("SC_CLK_TCK")


def num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def free_port(count: int = 1) -> int:
    """The first of `count` ports on the loopback address that nobody listens on now."""
    while True:
        with contextlib.ExitStack() as probes:
            first = probes.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                for number in range(1, count):
                    probes.enter_context(socket.create_server(("127.0.0.1", first + number)))
                return int(first)
