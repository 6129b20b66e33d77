"""The private folder that holds the pipeline's sockets; one launcher at a time has it.

Only files of a pipeline are removed from it: `--run-dir` may name a folder that holds other files, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path
from types import TracebackType

from launcher.environment import BRIEF_CACHE, MAX_SOCKET_NAME
from pipeline.process.core_sharing import FILE as ACTIVITY
from pipeline.process.flight_recorder import PREFIX as FLIGHT
from pipeline.process.liveness import LOCK
from pipeline.transport.cluster import SPEC_FILE
from pipeline.wire.topology import EDGES, MAX_IPC_PATH

LOCK_TRIES, LOCK_PAUSE_S = 5, 0.02
EDGE_NAMES = "|".join(edge.name for edge in EDGES)
# Sockets by edge, rank and epoch; rendezvous files of ranks; core sharing and its bells; flight recorders;
# what clients need for other nodes.
OURS = re.compile(
    rf"(?:{EDGE_NAMES})(?:\.\d+){{0,2}}|ranks\.\d+\.\d+|{ACTIVITY}(?:\.[a-z]+\.\d+)?"
    rf"|{re.escape(FLIGHT)}[a-z]+\.\d+|{SPEC_FILE}"
)


class RunDir:
    """A locked folder of mode 0700. Removed at the end, if `path` is empty; else only its lock file is left.

    Raises ValueError when the folder is in use, open to other users, or too long a path for sockets.
    """

    def __init__(self, path: str, base: Path) -> None:
        self._is_own = not path
        self._path, self._base = path, base
        self._lock = self._folder = -1

    def __enter__(self) -> Path:
        self.path = (
            Path(tempfile.mkdtemp(prefix="vlm-", dir=self._base))
            if self._is_own
            else Path(self._path).absolute()
        )
        excess = len(os.fsencode(self.path)) + 1 + MAX_SOCKET_NAME - MAX_IPC_PATH
        if excess > 0:
            limit = f"a socket's path has at most {MAX_IPC_PATH}"
            raise ValueError(f"run_dir {str(self.path)!r} is too long by {excess} bytes: {limit}")
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = self.path.stat()
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise ValueError(
                f"run_dir {str(self.path)!r} must belong to you and be closed to others (mode 0700)"
            )
        self._lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._take_lock():
            os.close(self._lock)
            raise ValueError(f"run_dir {str(self.path)!r} is in use by another launcher")
        # systemd's cleaner of temporary files skips a locked folder with all that is in it.
        self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # not every file system can lock a folder
            fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self._clear()  # files of a killed launcher
        return self.path

    def _take_lock(self) -> bool:
        """Tries several times: a client that checks its launcher's lock holds it for microseconds."""
        for _ in range(LOCK_TRIES):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(LOCK_PAUSE_S)
        return False

    def _clear(self) -> None:
        shutil.rmtree(self.path / BRIEF_CACHE, ignore_errors=True)
        for entry in self.path.iterdir():
            if OURS.fullmatch(entry.name):
                entry.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.path.is_dir():  # unless it was removed
            self._clear()
        os.close(self._folder)
        # the file stays: unlinking it would let two launchers lock two files of one name
        os.close(self._lock)
        if self._is_own:
            shutil.rmtree(self.path, ignore_errors=True)
