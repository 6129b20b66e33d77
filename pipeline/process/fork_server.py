"""The fork server: it has imported torch, and workers are forks of it, so that a start costs only a model's
load.

The server opens no files, computes nothing and has one thread, so that a fork is as good as a new process.
Over a pair of sockets the launcher requests starts and kills, and the server reports forks and ends; an end
is reported once the process is reaped. If the launcher dies, the server ends every worker; if the server
dies, the workers end, too.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping, Sequence
from typing import NoReturn, assert_never

import msgspec

from pipeline.process.parent import end_with_parent
from pipeline.process.process import WorkerSpec, run_worker
from pipeline.process.titles import SERVER, set_title

MAX_REQUEST = 1 << 17  # bytes; the system has room for 200 KiB
MAX_FDS = 253  # of one request: the system's limit
STOP_TIMEOUT_S = 10.0


class Start(msgspec.Struct, frozen=True, tag=True):
    serial: int
    spec: WorkerSpec


class Kill(msgspec.Struct, frozen=True, tag=True):
    serial: int


class Forked(msgspec.Struct, frozen=True, tag=True):
    serial: int
    pid: int


class ProcessEnded(msgspec.Struct, frozen=True, tag=True):
    """All ends found at once: a killed process comes together with those that ended because of it."""

    exit_codes: dict[int, int]  # by serial; negative: the signal that killed it


class WorkerProcess:
    """A worker's process in the launcher."""

    def __init__(self, server: ForkServer, serial: int) -> None:
        self._server, self._serial = server, serial
        self.pid: int | None = None  # until it is forked
        self.exit_code: int | None = None  # while it lives; negative: the signal that killed it

    def kill(self) -> None:
        self._server.kill(self._serial)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the process is reaped, or the server has ended, with which all workers end."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.exit_code is None and not self._server.is_dead:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            poll = select.poll()  # `select` takes no descriptors from 1024 on
            poll.register(self._server, select.POLLIN)
            poll.poll(None if left is None else 1000 * left)
            self._server.read()
        return True


class ForkServer:
    """The launcher's side. Poll it for reading; `read` then updates every `WorkerProcess`."""

    def __init__(self, environment: Mapping[str, str], inherited: Sequence[int] = ()) -> None:
        """`environment` is the workers'. `inherited`: descriptors that the server and all workers keep."""
        self._environment, self._inherited = dict(environment), inherited
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server: subprocess.Popen[bytes] | None = None
        self._processes: dict[int, WorkerProcess] = {}
        self._num_started = 0
        self.is_dead = False

    def start(self) -> None:
        descriptor = self._theirs.fileno()
        # Inherited by the server, which so ignores these signals from its first instruction on.
        ignored = {
            number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "workers", str(descriptor)],
                stdin=subprocess.DEVNULL, env=self._environment,
                pass_fds=[descriptor, *self._inherited],
            )  # fmt: skip
        finally:
            for number, handler in ignored.items():
                signal.signal(number, handler)
            self._theirs.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def fork(self, spec: WorkerSpec, fds: Sequence[int] = ()) -> WorkerProcess:
        """Starts a worker that inherits `fds`: see `WorkerContext`."""
        self._num_started += 1
        process = self._processes[self._num_started] = WorkerProcess(self, self._num_started)
        self._send(Start(self._num_started, spec), fds)
        return process

    def kill(self, serial: int) -> None:
        if serial in self._processes:
            self._send(Kill(serial))

    def _send(self, request: Start | Kill, fds: Sequence[int] = ()) -> None:
        data = msgspec.msgpack.encode(request)
        assert len(data) <= MAX_REQUEST
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # `read` sets `is_dead`
            socket.send_fds(self._socket, [data], list(fds))

    def read(self) -> None:
        """Handles the server's reports; never blocks."""
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
            match msgspec.msgpack.decode(data, type=Forked | ProcessEnded):
                case Forked(serial, pid):
                    self._processes[serial].pid = pid
                case ProcessEnded(exit_codes):
                    for serial, exit_code in exit_codes.items():
                        self._processes.pop(serial).exit_code = exit_code
                case other:
                    assert_never(other)

    def close(self) -> None:
        """Ends the server and every worker that still lives. Kills a server that does not react."""
        self._socket.close()
        self._theirs.close()
        if self._server is None:
            return
        try:
            self._server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()


class _Server:
    """The server's side."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # workers that are still to be forked, in order, and the descriptors for each; by serial
        self._starts: dict[int, tuple[WorkerSpec, list[int]]] = {}
        self._pids: dict[int, int] = {}  # by serial
        # serials, by the descriptor that is readable once the process has ended
        self._sentinels: dict[int, int] = {}
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def run(self) -> None:
        """Until the launcher closes its end. Requests and ends come before the next start, since a start may
        import a module for seconds."""
        while True:
            ready = [fd for fd, _ in self._poll.poll(0 if self._starts else None)]
            self._reap([fd for fd in ready if fd in self._sentinels])
            if self._connection.fileno() in ready:
                if not self._read():
                    break
            elif self._starts:
                self._start(next(iter(self._starts)))
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
        self._reap(list(self._sentinels))

    def _read(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._connection, MAX_REQUEST, MAX_FDS)
        except ConnectionResetError:  # the launcher died with unread reports
            data, fds = b"", []
        if not data:
            return False
        match msgspec.msgpack.decode(data, type=Start | Kill):
            case Start(serial, spec):
                self._starts[serial] = spec, list(fds)
            case Kill(serial):
                if (start := self._starts.pop(serial, None)) is not None:
                    _close(start[1])
                    self._report(ProcessEnded({serial: -signal.SIGKILL}))
                elif serial in self._pids:
                    os.kill(self._pids[serial], signal.SIGKILL)
            case other:
                assert_never(other)
        return True

    def _start(self, serial: int) -> None:
        spec, fds = self._starts.pop(serial)
        others = [fd for _, waiting in self._starts.values() for fd in waiting]
        try:
            pid = _fork(spec, fds, [self._connection.fileno(), *self._sentinels, *others])
        except OSError:
            traceback.print_exc()
            self._report(ProcessEnded({serial: 1}))
            return
        finally:
            _close(fds)
        self._pids[serial] = pid
        sentinel = os.pidfd_open(pid)
        self._sentinels[sentinel] = serial
        self._poll.register(sentinel, select.POLLIN)
        self._report(Forked(serial, pid))

    def _reap(self, sentinels: Sequence[int]) -> None:
        exit_codes: dict[int, int] = {}
        for sentinel in sentinels:
            serial = self._sentinels.pop(sentinel)
            _, status = os.waitpid(self._pids.pop(serial), 0)
            exit_codes[serial] = os.waitstatus_to_exitcode(status)
            self._poll.unregister(sentinel)
            os.close(sentinel)
        if exit_codes:
            self._report(ProcessEnded(exit_codes))

    def _report(self, message: Forked | ProcessEnded) -> None:
        # `_read` finds that the launcher is dead
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(msgspec.msgpack.encode(message))


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _fork(spec: WorkerSpec, fds: Sequence[int], not_its_own: Sequence[int]) -> int:
    module = f"workers.{spec.worker.role}.worker"
    with contextlib.suppress(Exception):  # the worker imports again, and reports the error
        importlib.import_module(module)
    gc.freeze()  # the collector of a fork skips the server's objects, so that their pages stay shared
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        end_with_parent()
        if os.getppid() == server:  # else the server died before `end_with_parent`
            _close(not_its_own)
            set_title(str(spec.worker))
            run_worker(module, spec, fds)
    except BaseException:  # noqa: BLE001  a fork must never return into the server's loop
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def main(arguments: list[str]) -> NoReturn:
    end_with_parent()
    set_title(SERVER)
    _Server(socket.socket(fileno=int(arguments[0]))).run()
    os._exit(0)
