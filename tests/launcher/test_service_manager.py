"""What systemd is told: sd_notify's protocol, over a real socket."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from launcher.service_manager import ALIVE, READY, STOPPING, ServiceManager
from tests.servers import Server


def listening(address: str) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(address)
    made.settimeout(60)
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
    told: list[str] = []

    def listen() -> None:  # beside the server: a socket holds few lines, and the launcher waits for nobody
        while STOPPING not in told:
            told.append(listener.recv(100).decode())

    with listening(path) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        with Server(environment={"NOTIFY_SOCKET": path}) as server:
            for pid in server.children.values():
                assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()
        thread.join()
    told_once = [line for line in told if line != ALIVE]
    assert told_once == [READY, STOPPING]
    assert ALIVE in told[: told.index(READY)]  # it is alive all the while it starts


def test_a_full_socket_makes_nobody_wait(short_path: Path) -> None:
    with listening(str(short_path / "notify")):
        manager = ServiceManager(str(short_path / "notify"))
        for _ in range(10_000):
            manager.tell(ALIVE)
        manager.close()
