from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import pytest

from tests.workers.api.serving import endpoint, get, serving
from workers.api import listener


async def test_many_that_begin_at_once_are_accepted_in_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = 0
    connect = listener.Listener._connect

    async def counted(self: listener.Listener, connection: socket.socket) -> None:
        nonlocal begun
        begun += 1
        await connect(self, connection)

    monkeypatch.setattr(listener.Listener, "_connect", counted)
    async with serving(endpoint()) as site:
        sockets = [socket.create_connection((site.host, site.port)) for _ in range(60)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert begun == 60
        answers = await asyncio.gather(*(_ask(one) for one in sockets))
        assert all(b" 200 " in answer[:20] for answer in answers)


async def _ask(connected: socket.socket) -> bytes:
    reader, writer = await asyncio.open_connection(sock=connected)
    writer.write(get("/health", "Connection: close"))
    answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return answer


class ShortOfFiles:
    """A listening socket whose process has no file left, so many times."""

    def __init__(self, real: socket.socket, times: int) -> None:
        self._real, self._times = real, times

    def accept(self) -> Any:
        if self._times:
            self._times -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return self._real.accept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


async def test_where_no_file_is_left_it_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "PAUSE_S", 0.05)
    real = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(socket, "create_server", lambda *_: ShortOfFiles(real, 2))
    async with serving(endpoint()) as site:
        assert b" 200 " in (await _ask(socket.create_connection((site.host, site.port))))[:20]
    assert caplog.text.count("no connection can be accepted now") == 2
