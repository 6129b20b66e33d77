"""Whether the launcher of a run directory lives: it holds a lock there as long as it does, frozen or not."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

LOCK = "lock"  # the file's name


class LauncherLife:
    """Keeps the file open, so that it can be asked also once a cleaner has removed it from its folder."""

    def __init__(self, run_dir: Path | None) -> None:
        """None: the launcher is on another machine."""
        self._fd: int | None = None
        self._run_dir = run_dir
        self._open()

    def _open(self) -> None:
        """Again later, should the file not be there yet, or no descriptor be free."""
        if self._fd is None and self._run_dir is not None:
            with contextlib.suppress(OSError):
                self._fd = os.open(self._run_dir / LOCK, os.O_RDONLY | os.O_CLOEXEC)

    def is_over(self) -> bool | None:
        """Whether the launcher has ended, as one without a lock has; None where that cannot be known.

        A launcher that starts meets our hold on the lock, which lasts microseconds: see `RunDir`.
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
