"""One node, as an actor of Ray: it runs that node's launcher as a child process, and starts it again when it
ends.

The driver (`ray_placement.py`) says again and again what is to run. So an actor that Ray has restarted, on
this machine or another, learns all that it needs from the next call.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from launcher.announcement import SERVING

PROJECT = Path(__file__).parents[1]  # the folder of this package
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # after which a launcher's end is no failed start


class Launch(NamedTuple):
    """What is to run."""

    arguments: tuple[str, ...]  # of the launcher
    token: str
    environment: dict[str, str]  # besides the actor's own
    folder: str  # the driver's; a relative path is meant from there


class NodeNews(NamedTuple):
    """What an actor says of itself and of its launcher."""

    node_id: str  # Ray's, in hexadecimal
    pid: int  # the actor's
    launcher_pid: int  # 0: none runs
    url: str  # of the HTTP endpoint, as the launcher has announced it; empty until then
    num_failures: int  # starts in a row that came to nothing


def pause_s(num_failures: int) -> float:
    """Before the next start."""
    return min(LONGEST_PAUSE_S, float(1 << min(num_failures, 16)))


class RayNode:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._launch: Launch | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._url, self._num_failures, self._is_ending = "", 0, False
        threading.Thread(target=self._run, daemon=True).start()

    # Called by the driver, each call in a thread of its own.

    def keep(self, launch: Launch | None, patience_s: float) -> NodeNews:
        """Runs the launcher from now on, anew where `launch` differs; None: leaves all as it is.

        Returns when there is news, or after `patience_s`.
        """
        with self._changed:
            if launch is not None and launch != self._launch and not self._is_ending:
                self._launch, self._num_failures = launch, 0
                self._terminate()
                self._changed.notify_all()
            before = self._news()
            self._changed.wait_for(lambda: self._news() != before, patience_s)
            return self._news()

    def release(self) -> None:
        """The launcher is not started again when it ends."""
        with self._changed:
            self._launch, self._is_ending = None, True
            self._changed.notify_all()

    def stop(self, patience_s: float) -> bool:
        """Ends the launcher as a signal does. False: it had to be killed."""
        self.release()
        with self._changed:
            self._terminate()
            if self._changed.wait_for(lambda: self._process is None, patience_s):
                return True
            if self._process is not None:
                self._process.kill()
            return False

    def _news(self) -> NodeNews:
        from ray import get_runtime_context

        return NodeNews(
            node_id=get_runtime_context().get_node_id(),
            pid=os.getpid(),
            launcher_pid=self._process.pid if self._process else 0,
            url=self._url,
            num_failures=self._num_failures,
        )

    def _terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()

    # In the thread that has the child.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._launch is not None)
                launch, started = self._launch, time.monotonic()
                if launch is None:
                    continue
                process = self._process = self._start(launch)
                self._changed.notify_all()
            has_served = self._follow(process)
            with self._changed:
                self._process, self._url = None, ""
                is_steady = has_served or time.monotonic() - started > STEADY_S
                self._num_failures = 0 if is_steady else self._num_failures + 1
                self._changed.notify_all()
                self._await_another(launch, pause_s(self._num_failures))

    def _await_another(self, launch: Launch, patience_s: float) -> None:
        self._changed.wait_for(lambda: self._launch is not launch, patience_s)

    def _start(self, launch: Launch) -> subprocess.Popen[bytes]:
        # The whole of the actor's environment: Ray has put there which GPUs the launcher may use.
        environment = {**os.environ, **launch.environment}
        if PROJECT.name not in ("site-packages", "dist-packages"):
            paths = (str(PROJECT), environment.get("PYTHONPATH", ""))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.ray_child", str(os.getpid()), *launch.arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True,
            cwd=launch.folder if Path(launch.folder).is_dir() else None,
        )  # fmt: skip
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(launch.token.encode())
            process.stdin.close()
        return process

    def _follow(self, process: subprocess.Popen[bytes]) -> bool:
        """Until the launcher's end. Whether it has served; its output becomes the actor's, which Ray shows
        at the driver."""
        assert process.stdout is not None
        has_served = False
        for line in process.stdout:
            text = line.decode(errors="replace")
            sys.stdout.write(text)
            sys.stdout.flush()
            if found := SERVING.match(text):
                with self._changed:
                    self._url, has_served = found[1], True
                    self._changed.notify_all()
        process.stdout.close()
        process.wait()
        return has_served
