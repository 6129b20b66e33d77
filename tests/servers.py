"""A real pipeline for a test: `python -m launcher` with real processes, and proof that nothing of it is
left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import pytest

from tools.processes import workers_of

if TYPE_CHECKING:
    import openai

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60
SHARED_S = 5  # for which a test beside may have shared memory


class Server:
    """Use as a context manager: it is up inside, and checked for leftovers at the end."""

    STARTED = re.compile(r"Serving at (\S+)/v1")

    def __init__(
        self,
        *options: str,
        expects_failure: bool = False,
        api_key: str = "",
        python_path: Path | None = None,
        program: str = "launcher",
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> None:
        """`api_key` is given in the environment; in `python_path` modules and packages are found first.
        `program` is a module, `environment` what its environment has beside this one's, `inside` a command
        that runs another."""
        self._folder = tempfile.TemporaryDirectory(prefix="vlm-test-")
        self.run_dir = Path(self._folder.name) / "run"
        self.run_dir.mkdir(mode=0o700)
        self._shared_memory = _shared_memory_files()
        self._options, self._expects_failure = options, expects_failure
        self._environment = {**os.environ, "VLM_API_KEY": api_key, **(environment or {})}
        self._program, self._inside = program, inside
        if python_path is not None:
            paths = (str(python_path), os.environ.get("PYTHONPATH", ""))
            self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.url = ""
        self.lines: list[str] = []
        self.children: dict[str, int] = {}

    def __enter__(self) -> Self:
        command = [
            *self._inside,
            sys.executable,
            "-m",
            self._program,
            "--port",
            "0",
            "--run-dir",
            str(self.run_dir),
            "--log-level",
            "debug",
            *self._options,
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=self._environment,
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if not self._expects_failure:
            if not self._ready.wait(START_TIMEOUT_S) or not self.url:
                self._kill()
                raise AssertionError("the server did not start:\n" + self.output)
            self.children = self.find_workers()
        return self

    def find_workers(self) -> dict[str, int]:
        """Process ids by name."""
        return workers_of(self.process.pid)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := self.STARTED.match(line):
                self.url = match.group(1)
                self._ready.set()
        self._ready.set()

    def wait_for(self, text: str, timeout_s: float = 60.0, count: int = 1) -> None:
        """Until so many lines have the text."""
        end = time.monotonic() + timeout_s
        while sum(text in line for line in list(self.lines)) < count:
            assert time.monotonic() < end, f"{text!r} was not said {count} times:\n{self.output}"
            time.sleep(0.05)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def client(self, api_key: str = "none") -> openai.OpenAI:
        import openai  # here: where the GPU is, it may not be installed

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=60)

    def wait(self) -> int:
        """Waits for the launcher to end by itself."""
        code = self.process.wait(STOP_TIMEOUT_S)
        self._reader.join()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def _kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(is_failing=kind is not None)
        finally:
            if self.process.poll() is None:
                self._kill()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self._folder.cleanup()

    def _end(self, is_failing: bool) -> None:
        if self.process.poll() is None:
            code = self.stop()
            assert code == 0 or is_failing, f"the launcher ended with {code}:\n{self.output}"
        self._reader.join()
        if not is_failing:
            self.assert_nothing_left()
            assert "does not stop: killed" not in self.output, self.output
            # each is told in a traceback, and by the launcher
            num_injected = self.output.count("InjectedFault: fault: ") // 2
            if not self.process.returncode and self.output.count("Traceback") != num_injected:
                pytest.fail(f"{self._tracebacks()}\n\nthe whole output:\n{self.output}")
            assert "AssertionError" not in self.output, self.output

    def _tracebacks(self) -> str:
        """Each traceback of the output with what stands around it: a long output is cut where it is read
        later."""
        lines = self.output.splitlines()
        starts = [number for number, line in enumerate(lines) if "Traceback" in line]
        return "\n---\n".join("\n".join(lines[max(0, start - 3) : start + 40]) for start in starts)

    def assert_nothing_left(self) -> None:
        assert [name for name, pid in self.children.items() if is_alive(pid)] == []
        assert [entry.name for entry in self.run_dir.iterdir()] in ([], ["lock"])
        # The launcher has a session of its own; with it, nothing of that session may be left, whenever it
        # ended.
        assert alive_in_session(self.process.pid) == []
        until = time.monotonic() + SHARED_S
        while left := _shared_memory_files() - self._shared_memory:
            assert time.monotonic() < until, left
            time.sleep(0.1)


def _shared_memory_files() -> set[str]:
    """Without the semaphores of multiprocessing: the server has none, but tests beside it have pools."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def alive_in_session(session: int) -> list[str]:
    """Names of the processes of a session that live; one that is dead and not yet reaped does not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, fields = stat.read_text().rpartition(")")
            state, _, _, process_session = fields.split()[:4]
            if int(process_session) == session and state not in "ZX":
                found.append(name)
    return found


def wait_until_dead(pids: dict[str, int], timeout_s: float) -> list[str]:
    """Names of those that still live after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while (left := [name for name, pid in pids.items() if is_alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left
