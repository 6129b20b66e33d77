"""The `Host` header: whether a request means this server.

A web page can point its own name at a loopback address (DNS rebinding) and then calls a local server as if
it were the page's own. Its requests show the page's name in `Host`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

from aiohttp import web

from pipeline.wire.errors import RequestError, shown
from workers.api.operations import OPEN_ROUTES

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
PORT = re.compile(r":[0-9]*$")


class Hosts:
    """`bound` is the address or name that the server listens on, `allowed` the option's value."""

    def __init__(self, bound: str, allowed: Sequence[str]) -> None:
        is_open = "*" in allowed or not (allowed or is_loopback(bound))
        self._names = (
            None if is_open else {_plain(name) for name in (*LOOPBACK_NAMES, bound, *allowed) if name}
        )

    def check(self, request: web.Request) -> None:
        """Raises RequestError for another server's name. Ports do not count: tunnels have others.

        Operators' health checks may use any name, and a request of HTTP/1.0 none; the parser refuses HTTP/1.1
        without one.
        """
        host = request.headers.get("Host")
        if self._names is None or host is None or request.path in OPEN_ROUTES:
            return
        if _plain(PORT.sub("", host)) not in self._names:
            what = f"the host {shown(host)} is not allowed here: the server's --allowed-hosts can allow it"
            raise RequestError(what, status=403)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`. May ask name servers."""
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    addresses = (str(address[0]).partition("%")[0] for *_, address in found)
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _plain(host: str) -> str:
    """A host as `Host` spells it, in lower case."""
    host = host.lower().removesuffix(".")
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
