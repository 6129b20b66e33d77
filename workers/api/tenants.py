"""The tenant of an HTTP request: the name by which the pipeline shares turns and credits out. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

IPV6_NETWORK_BITS = 64  # of an address: the owner of the network chooses the rest freely


def peer_tenant(remote: str | None, forwarded_for: Sequence[str] = ()) -> str:
    """The tenant of a client without a key: its peer address, or the last address in the `X-Forwarded-For`
    headers of a trusted proxy.

    Earlier addresses there may be forged by the client. An IPv6 /64 network counts as one tenant.
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
