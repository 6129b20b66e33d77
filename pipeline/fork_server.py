"""Worker processes are forks of one process that has imported what they need, so that a start costs a model's load and not torch's import.

The fork server opens nothing, computes nothing and has one thread; so a fork of it is as good as a process of its own. The launcher
asks it over a pair of sockets for starts and kills, and is told of forks and ends; an end is told once the process is reaped.
If the launcher goes, the server ends every worker; if the server goes, so do the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import msgspec

from pipeline.parent import end_with_parent
from pipeline.process import WorkerSpec, run_worker
from pipeline.topology import WorkerId

MAX_REQUEST = 1 << 16  # bytes
STOP_TIMEOUT_S = 10.0
TITLE_ROOM = "." * 24  # a worker's command line is written over the server's and is longer
PR_SET_NAME = 15


class Start(msgspec.Struct, frozen=True, tag=True):
    serial: int
    spec: WorkerSpec


class Kill(msgspec.Struct, frozen=True, tag=True):
    serial: int


class Forked(msgspec.Struct, frozen=True, tag=True):
    serial: int
    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    serial: int
    exit_code: int  # negative: the signal that killed it


class WorkerProcess:
    """One start of a worker, as the launcher sees it."""

    def __init__(self, server: ForkServer, serial: int) -> None:
        self._server, self._serial = server, serial
        self.pid: int | None = None  # until it is forked
        self.exit_code: int | None = None  # while it lives; negative: the signal that killed it

    def kill(self) -> None:
        self._server.kill(self._serial)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended and been reaped."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.exit_code is None and not self._server.is_dead:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            select.select([self._server], [], [], left)
            self._server.read()
        return True


class ForkServer:
    """The launcher's side. To be polled for reading; then `read` brings every process up to date."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` is the workers'."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "workers", str(theirs.fileno()), TITLE_ROOM]
        # The signals are ignored from the first instruction of the child on; it could not yet do so itself.
        ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(environment), pass_fds=[theirs.fileno()])
        finally:
            for number, handler in ignored.items():
                signal.signal(number, handler)
            theirs.close()
        self._processes: dict[int, WorkerProcess] = {}
        self._num_started = 0
        self.is_dead = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def start(self, spec: WorkerSpec) -> WorkerProcess:
        self._num_started += 1
        process = self._processes[self._num_started] = WorkerProcess(self, self._num_started)
        self._send(Start(self._num_started, spec))
        return process

    def kill(self, serial: int) -> None:
        if serial in self._processes:
            self._send(Kill(serial))

    def _send(self, request: Start | Kill) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `read` finds that it is dead
            self._socket.send(msgspec.msgpack.encode(request))

    def read(self) -> None:
        """Takes what the server has told; never blocks."""
        while not self.is_dead:
            try:
                data = self._socket.recv(MAX_REQUEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data = b""
            if not data:
                self.is_dead = True
                return
            match msgspec.msgpack.decode(data, type=Forked | Ended):
                case Forked(serial, pid):
                    self._processes[serial].pid = pid
                case Ended(serial, exit_code):
                    self._processes.pop(serial).exit_code = exit_code

    def close(self) -> None:
        """Ends the server, and with it every worker that still lives."""
        self._socket.close()
        try:
            self._server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


class _Child:
    def __init__(self, serial: int, pid: int) -> None:
        self.serial, self.pid, self.sentinel = serial, pid, os.pidfd_open(pid)


def serve(connection: socket.socket) -> None:
    """The server's loop, until the launcher closes its end."""
    children: dict[int, _Child] = {}  # by sentinel
    poll = select.poll()
    poll.register(connection, select.POLLIN)

    def reap(child: _Child) -> None:
        _, status = os.waitpid(child.pid, 0)
        poll.unregister(child.sentinel)
        os.close(child.sentinel)
        del children[child.sentinel]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(msgspec.msgpack.encode(Ended(child.serial, os.waitstatus_to_exitcode(status))))

    while True:
        for fd, _ in poll.poll():
            if fd in children:
                reap(children[fd])
                continue
            data = connection.recv(MAX_REQUEST)
            if not data:
                for child in list(children.values()):
                    os.kill(child.pid, signal.SIGKILL)
                    reap(child)
                return
            match msgspec.msgpack.decode(data, type=Start | Kill):
                case Start(serial, spec):
                    pid = _fork(spec, connection, [child.sentinel for child in children.values()])
                    child = _Child(serial, pid)
                    children[child.sentinel] = child
                    poll.register(child.sentinel, select.POLLIN)
                    connection.send(msgspec.msgpack.encode(Forked(serial, pid)))
                case Kill(serial):
                    for child in children.values():
                        if child.serial == serial:
                            os.kill(child.pid, signal.SIGKILL)


def _fork(spec: WorkerSpec, connection: socket.socket, sentinels: list[int]) -> int:
    module = f"workers.{spec.worker.role}.worker"
    with contextlib.suppress(Exception):  # the worker meets the error again, and tells it as its own
        importlib.import_module(module)
    gc.freeze()  # what is there already is never looked at again: its pages stay shared
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        end_with_parent()
        if os.getppid() == server:  # else it died before it could tell
            connection.close()
            for sentinel in sentinels:
                os.close(sentinel)
            _set_title(spec.worker)
            run_worker(module, spec)
    except BaseException:  # noqa: BLE001  nothing of the server's may run on in a worker
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _set_title(worker: WorkerId) -> None:
    """Shows the worker's name in listings of processes. The kernel reads a command line from where it put it when the server started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    title = "\0".join([sys.executable, "-m", f"workers.{worker.role}", str(worker.rank)]).encode()
    ctypes.memmove(start, title[: end - start - 1].ljust(end - start, b"\0"), end - start)
    ctypes.CDLL(None).prctl(PR_SET_NAME, str(worker).encode())


def main(arguments: list[str]) -> NoReturn:
    end_with_parent()
    with socket.socket(fileno=int(arguments[0])) as connection:
        serve(connection)
    os._exit(0)
