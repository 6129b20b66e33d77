"""A launcher's life, as others on its machine see it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.run_dir import RunDir
from pipeline.process.liveness import LOCK, LauncherLife

HOLDER = (
    "import sys, pathlib, time\nfrom launcher.run_dir import RunDir\n"
    "with RunDir(sys.argv[1], pathlib.Path('/')):\n    print('up', flush=True)\n    time.sleep(60)"
)


def test_a_frozen_launcher_lives_and_a_killed_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launcher = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"up\n"
    life = LauncherLife(folder)
    assert life.is_over() is False
    launcher.send_signal(signal.SIGSTOP)
    assert life.is_over() is False
    (folder / LOCK).unlink()
    assert life.is_over() is False, "a cleaner has removed the file, not the launcher"
    launcher.kill()
    os.waitid(os.P_PID, launcher.pid, os.WEXITED | os.WNOWAIT)  # it is not reaped yet
    assert life.is_over() is True
    launcher.wait()
    launcher.stdout.close()
    life.close()


def test_who_asks_does_not_keep_a_launcher_from_starting(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunDir(str(folder), tmp_path):
        life = LauncherLife(folder)
    assert life.is_over() is True
    with RunDir(str(folder), tmp_path):
        assert life.is_over() is False
        with pytest.raises(ValueError, match="in use"), RunDir(str(folder), tmp_path):
            pass
    life.close()


def test_a_lock_that_comes_later_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    life = LauncherLife(folder)
    assert life.is_over() is True
    with RunDir(str(folder), tmp_path):
        assert life.is_over() is False
    assert life.is_over() is True
    life.close()


def test_without_a_lock_there_is_no_launcher_and_elsewhere_nobody_knows(tmp_path: Path) -> None:
    assert LauncherLife(tmp_path).is_over() is True
    assert LauncherLife(None).is_over() is None
