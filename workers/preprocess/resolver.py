"""Names of media hosts to addresses, public ones only."""

from __future__ import annotations

import ipaddress
import socket

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

IPV6_UNICAST = ipaddress.ip_network("2000::/3")


class _BlockedAddress(OSError):
    pass


class PublicResolver(AbstractResolver):
    """Resolves a name once and keeps public addresses only; the connection goes to exactly those."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise _BlockedAddress("not a public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


def is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in IPV6_UNICAST or ip.sixtofour is not None or ip.teredo is not None:
            return False  # forms that carry an IPv4 address lead wherever a gateway takes them
    return ip.is_global and not ip.is_multicast
