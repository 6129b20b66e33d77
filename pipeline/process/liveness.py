"""Whether the launcher of a run directory lives: it holds a lock there as long as its process exists."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

LOCK = "lock"  # the file's name


class LauncherLife:
    """Keeps the lock file open, so that it can still be checked when a cleaner has removed the file."""

    def __init__(self, run_dir: Path | None) -> None:
        """None: the launcher is on another machine."""
        self._fd: int | None = None
        self._run_dir = run_dir
        self._open()

    def _open(self) -> None:
        """Tried again later if the file does not exist yet, or no descriptor is free."""
        if self._fd is None and self._run_dir is not None:
            with contextlib.suppress(OSError):
                self._fd = os.open(self._run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)

    def is_over(self) -> bool | None:
        """Whether the launcher has ended, that is, the lock is free; None where that cannot be known.

        Takes the lock for microseconds, for which a starting launcher waits: see `RunDir`.
        """
        self._open()
        if self._fd is None:
            return None if self._run_dir is None else True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
