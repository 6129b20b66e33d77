"""On whose behalf an HTTP request is: the name by which the pipeline shares turns and credits out. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

IPV6_NETWORK_BITS = 64  # of an address: the rest is anybody's choice who has the network


def peer_tenant(remote: str | None, forwarded_for: Sequence[str] = ()) -> str:
    """Who has no key: the other end of its connection, or the last address in the headers of a trusted proxy.

    What stands before the last one is the client's own word. Who has an IPv6 network has 2^64 addresses, and
    is one tenant.
    """
    given = forwarded_for[-1].rpartition(",")[2] if forwarded_for else ""
    for text in (given, remote or ""):
        if (address := _address(text.strip())) is not None:
            return f"peer:{address}"
    return "peer:local"  # a socket without addresses


def _address(text: str) -> str | None:
    if text.startswith("["):  # [address]:port
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # address:port
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, IPV6_NETWORK_BITS), strict=False))
