"""Network interfaces of this machine, by their addresses."""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def interface_of(address: str) -> str:
    """The name of the interface that has an address; empty: none has it."""
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
        names = [row[-1] for row in rows if row[0] == wanted]
    else:
        names = [name for _, name in socket.if_nameindex() if _ipv4_of(name) == address]
    return names[0] if names else ""


def _ipv4_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(found[20:24])
