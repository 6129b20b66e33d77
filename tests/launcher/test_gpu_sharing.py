"""The private MPS daemon, with stand-ins for NVIDIA's programs and for the probe."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import gpu_sharing as module
from launcher.gpu_sharing import LOGS, PIPES, gpu_sharing
from pipeline.config import Config, LauncherConfig, ModelConfig

# With -f it listens (a file stands for the socket) until another one, which talks to it, says quit.
DAEMON = """#!/bin/bash
if [ "$1" = -f ]; then
    echo $$ >"$CUDA_MPS_PIPE_DIRECTORY/pid"
    touch "$CUDA_MPS_PIPE_DIRECTORY/control"
    while [ ! -e "$CUDA_MPS_PIPE_DIRECTORY/quit" ]; do sleep 0.02; done
else
    read -r line && [ "$line" = quit ] && touch "$CUDA_MPS_PIPE_DIRECTORY/quit"
fi
"""
SMI = "#!/bin/bash\necho '{mode}, {mig}'\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Puts programs into a folder of their own, which is the PATH of the environment that is returned; the
    probe is `probe`."""

    def put(
        daemon: str | None = DAEMON, mode: str = "Default", mig: str = "Disabled", probe: str = ""
    ) -> dict[str, str]:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, text in ((module.CONTROL, daemon), ("nvidia-smi", SMI.format(mode=mode, mig=mig))):
            if text is not None:
                (folder / name).write_text(text)
                (folder / name).chmod(0o700)
        monkeypatch.setattr(module, "PROBE", probe)
        path = f"{folder}:/usr/bin:/bin"
        monkeypatch.setenv("PATH", path)
        return {"PATH": path, "HOME": "/"}

    return put


def config(option: str, device: str = "auto") -> Config:
    return Config(launcher=LauncherConfig(gpu_sharing=option), model=ModelConfig(device=device))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("option", ["auto", "mps"])
def test_a_daemon_of_its_own_runs_as_long_as_the_launcher(
    option: str, install: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    environment = install()
    with gpu_sharing(config(option), tmp_path, environment, driver=Path("/dev/null")) as workers:
        assert workers == {**environment, PIPES: str(tmp_path / "mps/pipe"), LOGS: str(tmp_path / "mps/log")}
        assert stat.S_IMODE(os.stat(workers[PIPES]).st_mode) == 0o700
        pid = int((tmp_path / "mps/pipe/pid").read_text())
        assert is_running(pid)
        assert os.getsid(pid) != os.getsid(0), "Ctrl-C would reach it"
    assert not is_running(pid)
    assert not (tmp_path / "mps").exists()


def test_a_daemon_that_does_not_quit_is_killed(
    install: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.3)
    environment = install(daemon=DAEMON.replace("quit ] && touch", "quit ] && echo"))
    with gpu_sharing(config("mps"), tmp_path, environment):
        pid = int((tmp_path / "mps/pipe/pid").read_text())
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("programs", "extra", "words"),
    [
        ({"daemon": None}, {}, "is not installed"),
        ({"daemon": "#!/bin/bash\nexit 3\n"}, {}, "ended at once, with code 3"),
        ({"mode": "Exclusive_Process"}, {}, "compute mode Exclusive_Process"),
        ({"mig": "Enabled"}, {}, "divided by MIG"),
        ({}, {PIPES: "/elsewhere"}, f"{PIPES} is set"),
        (
            {"probe": "raise SystemExit('cudaErrorMpsConnectionFailed')"},
            {},
            "a probe under MPS failed: cudaErrorMpsConnectionFailed",
        ),
        ({"probe": "import time; time.sleep(60)"}, {}, "did not end within"),
        ({"daemon": "#!/bin/bash\nsleep 60\n"}, {}, "did not listen within"),
    ],
)
def test_where_it_cannot_be_auto_takes_turns_and_mps_is_an_error(
    programs: dict[str, str | None], extra: dict[str, str], words: str,
    install: Callable[..., dict[str, str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "PROBE_TIMEOUT_S", 1.0 if words.startswith("did not") else 30.0)
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.3)
    environment = install(**programs) | extra
    caplog.set_level("INFO")
    with gpu_sharing(config("auto"), tmp_path, environment, driver=Path("/dev/null")) as workers:
        assert workers == environment
    assert words in caplog.text
    with pytest.raises(ValueError, match=words), gpu_sharing(config("mps"), tmp_path, environment):
        pass
    assert not (tmp_path / "mps").exists()


@pytest.mark.parametrize(
    ("option", "device", "driver"),
    [("timeslice", "auto", "/dev/null"), ("auto", "cpu", "/dev/null"), ("auto", "auto", "/none")],
)
def test_nothing_is_started_where_nothing_is_shared(
    option: str, device: str, driver: str, install: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    environment = install()
    with gpu_sharing(config(option, device), tmp_path, environment, driver=Path(driver)) as workers:
        assert workers == environment
        assert not (tmp_path / "mps").exists()


def test_mps_on_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for GPUs"), gpu_sharing(config("mps", "cpu"), tmp_path, {}):
        pass


def test_it_ends_with_a_launcher_that_is_killed(
    install: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    environment = install()
    child = os.fork()
    if not child:
        with gpu_sharing(config("mps"), tmp_path, environment):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    pid = int((tmp_path / "mps/pipe/pid").read_text())
    end = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    assert not is_running(pid)
    with gpu_sharing(config("mps"), tmp_path, environment):
        assert int((tmp_path / "mps/pipe/pid").read_text()) != pid
