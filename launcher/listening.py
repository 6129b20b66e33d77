"""The endpoint's sockets: the launcher listens and passes them to each incarnation of `api`, so that between
two incarnations clients wait and are not refused."""

from __future__ import annotations

import os
import socket

BACKLOG = 1024


def listen(host: str, port: int) -> list[socket.socket]:
    """On every address of a host; port 0: one free port for all. Raises OSError that names the address."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    for family, _, _, _, address in dict.fromkeys(found):
        bound = (address[0], sockets[0].getsockname()[1] if sockets else port, *address[2:])
        try:
            sockets.append(socket.create_server(bound, family=family, backlog=BACKLOG))
        except OSError as error:
            for opened in sockets:
                opened.close()
            raise OSError(
                f"cannot listen on {host or '*'}, port {port}: {os.strerror(error.errno or 0)}"
            ) from None
    return sockets
