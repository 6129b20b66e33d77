"""Resolves names of media hosts: many at once, each with a deadline, so that no lookup delays another.

c-ares (`aiodns`) queries the name servers of /etc/resolv.conf and reads /etc/hosts. `getaddrinfo` would take
a thread for each name: uvloop has four, libuv uses two of them for names, and two names whose servers never
answer would block all others. Connections go to exactly the addresses that were checked here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from aiohttp.abc import AbstractResolver, ResolveResult

if TYPE_CHECKING:
    import pycares

Lookup: TypeAlias = "asyncio.Future[pycares.AddrInfoResult]"

LOOKUP_TIMEOUT_S = 5.0
# c-ares waits five times a server's average latency, at least 250 ms (`ares_metrics.c`): with a fast cache,
# two tries are over after 0.75 s. A slower name is looked up again until the deadline. Few tries each time,
# since c-ares cannot cancel one lookup, and continues after the deadline.
TRIES = 2
FIRST_TRY_S = 0.5
MAX_ROUNDS = 10
MAX_LOOKUPS = 2048  # in flight, abandoned ones included: four times the number of downloads
CLOSING_S = 1.0
IPV6_UNICAST = ipaddress.ip_network("2000::/3")


class MediaResolver(AbstractResolver):
    """Use within one loop; `close` it at the end. `nameservers` (`address:port`) replace the system's."""

    def __init__(self, allow_private: bool, nameservers: Sequence[str] = ()) -> None:
        import aiodns  # at the first URL: a machine without it serves everything else (docs/gpu.md)

        self._allow_private, self._timed_out = allow_private, aiodns.error.ARES_ETIMEOUT
        self._dns = aiodns.DNSResolver(nameservers or None, timeout=FIRST_TRY_S, tries=TRIES)
        self._lookups: set[Lookup] = set()

    async def resolve(
        self,
        host: str,
        port: int = 0,
        family: socket.AddressFamily = socket.AF_UNSPEC,
    ) -> list[ResolveResult]:
        """The allowed addresses of a host. Raises OSError when there is none."""
        found: list[ResolveResult] = []
        for node in (await self._look_up(host, family)).nodes:
            address = node.addr[0].decode()
            if self._allow_private or is_public(address):
                found.append(
                    ResolveResult(
                        hostname=host,
                        host=address,
                        port=port,
                        family=node.family,
                        proto=0,
                        flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                    )
                )
        if not found:
            raise OSError("the name has no address that may be connected to")
        return found

    async def _look_up(self, host: str, family: socket.AddressFamily) -> pycares.AddrInfoResult:
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                for _ in range(MAX_ROUNDS):
                    lookup = self._start(host, family)
                    await asyncio.wait([lookup])  # a deadline or a cancellation ends only the wait
                    error = lookup.exception()
                    if error is None:
                        return lookup.result()
                    if error.args[0] != self._timed_out:
                        # Without a socket c-ares only reports that no server was reached: raises the cause.
                        socket.socket(type=socket.SOCK_DGRAM).close()
                        raise OSError("the name cannot be resolved") from error
        except TimeoutError:
            pass
        raise OSError(f"the name servers have not answered within {LOOKUP_TIMEOUT_S:.0f} s")

    def _start(self, host: str, family: socket.AddressFamily) -> Lookup:
        if len(self._lookups) >= MAX_LOOKUPS:
            raise OSError("too many names are being looked up")
        lookup = self._dns.getaddrinfo(host, family=family, type=socket.SOCK_STREAM)
        self._lookups.add(lookup)
        lookup.add_done_callback(self._on_done)
        return lookup

    def _on_done(self, lookup: Lookup) -> None:
        self._lookups.discard(lookup)
        if not lookup.cancelled():
            lookup.exception()  # retrieved, since the wait may have ended: asyncio would warn

    async def close(self) -> None:
        """Waits for lookups: c-ares' thread calls into the event loop, which must still be open."""
        self._dns.cancel()
        if self._lookups:
            await asyncio.wait(self._lookups, timeout=CLOSING_S)
        await self._dns.close()


def is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip not in IPV6_UNICAST or ip.sixtofour is not None or ip.teredo is not None:
            return False  # forms with an embedded IPv4 address lead to wherever a gateway translates them
    return ip.is_global and not ip.is_multicast
