"""Wakes a process of the same run directory that waits: a named pipe, so that nobody has to poll."""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path


class Bell:
    """Both sides open it by its path. It keeps ringing until the next `wait`."""

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        # For reading and writing, so that neither side waits for the other to open it.
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._fd, select.POLLIN)

    def ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it is ringing
            os.write(self._fd, b"!")

    def wait(self, timeout_s: float) -> None:
        if self._poller.poll(1000 * timeout_s):
            with contextlib.suppress(BlockingIOError):
                os.read(self._fd, 1 << 16)

    def close(self) -> None:
        os.close(self._fd)
