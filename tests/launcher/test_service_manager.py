"""What systemd is told: sd_notify's protocol, over a real socket."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from launcher.service_manager import ALIVE, READY, STOPPING, ServiceManager
from tests.servers import Server


def listening(address: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(address)
    made.settimeout(5)
    return made


@pytest.mark.parametrize("is_abstract", [False, True])
def test_lines_arrive_together(short_path: Path, is_abstract: bool) -> None:
    named = f"@vlm-{os.getpid()}" if is_abstract else str(short_path / "notify")
    with listening(named.replace("@", "\0")) as listener:
        manager = ServiceManager(named)
        manager.tell(READY, "STATUS=serving")
        assert listener.recv(100) == b"READY=1\nSTATUS=serving"
        manager.close()


def test_nobody_listens(short_path: Path) -> None:
    for address in ("", str(short_path / "nobody")):
        manager = ServiceManager(address)
        manager.tell(READY)
        manager.close()


def test_the_launcher_tells_its_states(short_path: Path) -> None:
    path = str(short_path / "notify")
    with listening(path) as listener, Server(environment={"NOTIFY_SOCKET": path}) as server:
        told = [listener.recv(100).decode()]
        while told[-1] != READY:  # it is alive all the while it starts
            told.append(listener.recv(100).decode())
        assert set(told[:-1]) <= {ALIVE}
        assert listener.recv(100).decode() == ALIVE
        for pid in server.children.values():
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
        server.process.send_signal(signal.SIGTERM)
        while (line := listener.recv(100).decode()) != STOPPING:
            assert line == ALIVE
        assert server.wait() == 0
