"""What the launcher tells systemd, or whoever speaks its protocol: that all workers serve, that the loop
still turns, that the end has begun (sd_notify(3); a unit with `Type=notify` and `WatchdogSec`).

A datagram of lines NAME=VALUE to the Unix socket that the variable NOTIFY_SOCKET names. Without the variable
nobody is told.
"""

from __future__ import annotations

import logging
import socket

VARIABLE = "NOTIFY_SOCKET"
READY, STOPPING, ALIVE = "READY=1", "STOPPING=1", "WATCHDOG=1"

logger = logging.getLogger(__name__)


class ServiceManager:
    def __init__(self, address: str) -> None:
        """`address`: the variable's value; @ begins an abstract one, and empty is none."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) if address else None
        )

    def tell(self, *lines: str) -> None:
        """Never waits. A manager that does not listen is no reason to end."""
        if self._socket is None:
            return
        try:
            self._socket.sendto("\n".join(lines).encode(), socket.MSG_DONTWAIT, self._address)
        except OSError as error:
            logger.debug("the service manager was not told: %s", error)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
