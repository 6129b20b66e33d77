"""A poller for the loops of workers and the launcher, and a wakeup for it from another thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any, Protocol

import zmq

from pipeline.transport.ends import Publisher, Receiver


class Wakeup:
    """Lets another thread wake a poller."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class Pollable(Protocol):
    def fileno(self) -> int: ...


class Poller:
    """Sleeps until a source is readable. It does not say which: the loop drains all sources."""

    def __init__(self, *sources: Receiver[Any] | Publisher[Any] | Pollable) -> None:
        self._poller = zmq.Poller()
        for source in sources:
            self.add(source)

    def add(self, source: Receiver[Any] | Publisher[Any] | Pollable) -> None:
        for one in _sockets_of(source):
            self._poller.register(one, zmq.POLLIN)

    def remove(self, source: Receiver[Any] | Publisher[Any] | Pollable) -> None:
        for one in _sockets_of(source):
            self._poller.unregister(one)

    def wait(self, timeout_s: float | None = None) -> None:
        self._poller.poll(None if timeout_s is None else max(0, int(timeout_s * 1000)))


def _sockets_of(source: Receiver[Any] | Publisher[Any] | Pollable) -> Sequence[Any]:
    return source.sockets if isinstance(source, Receiver | Publisher) else (source.fileno(),)
