"""Network namespaces that stand for machines."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence

NETWORK = "10.77.0"  # of the namespaces; this process is .254


@contextlib.contextmanager
def namespaces(count: int, delay_ms: float = 1.0) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Network namespaces that a bridge connects: their addresses, and the commands that run others in them.

    Each packet takes `delay_ms`, where the kernel can delay packets. Raises OSError where this process may
    not make namespaces.
    """
    prefix = f"vlm{os.getpid() % 10000}"
    made: list[str] = []
    try:
        _ip("link", "add", f"{prefix}b", "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.254/24", "dev", f"{prefix}b")
        _ip("link", "set", f"{prefix}b", "up")
        for number in range(count):
            name = f"{prefix}n{number}"
            _ip("netns", "add", name)
            made.append(name)
            outer, inner = f"{prefix}o{number}", f"{prefix}i{number}"
            _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
            _ip("link", "set", outer, "master", f"{prefix}b", "up")
            _ip("link", "set", inner, "netns", name)
            _ip("-n", name, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", inner)
            _ip("-n", name, "link", "set", inner, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            delay = ["qdisc", "add", "dev", inner, "root", "netem", "delay", f"{delay_ms}ms"]
            # not every kernel has netem
            subprocess.run(["tc", "-n", name, *delay], check=False, capture_output=True)
        yield (
            [f"{NETWORK}.{number + 1}" for number in range(count)],
            [["ip", "netns", "exec", name] for name in made],
        )
    finally:
        for name in made:
            _ip("netns", "del", name)
        with contextlib.suppress(OSError):
            _ip("link", "del", f"{prefix}b")


def set_link(inside: Sequence[str], is_up: bool) -> None:
    """The network of a namespace, by the command that runs others in it; its loopback stays."""
    name = inside[3]
    number = name.rpartition("n")[2]
    _ip("-n", name, "link", "set", f"{name.rpartition('n')[0]}i{number}", "up" if is_up else "down")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
