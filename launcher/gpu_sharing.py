"""How a ViT and an LLM rank share a GPU: in time slices, or at once through a private NVIDIA MPS daemon.

Without MPS the driver gives the whole GPU to one process at a time. With MPS kernels of several processes run
side by side, and a fault of one reaches all. The daemon's sockets are in the run directory, and it ends with
this launcher.
"""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipeline.config import Config
from pipeline.process.parent import end_with_parent

logger = logging.getLogger(__name__)
CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
PROBE_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
PROBE = """
from cuda.bindings import runtime
error, pointer = runtime.cudaMalloc(1 << 20)
if int(error):
    raise SystemExit(repr(error))
for error, *_ in (runtime.cudaMemset(pointer, 1, 1 << 20), runtime.cudaDeviceSynchronize()):
    if int(error):
        raise SystemExit(repr(error))
"""


class MpsUnavailable(Exception):
    """MPS cannot be used here, and why."""


@contextmanager
def gpu_sharing(
    config: Config, run_dir: Path, environment: Mapping[str, str], driver: Path = Path("/dev/nvidiactl")
) -> Iterator[dict[str, str]]:
    """The workers' environment; a daemon runs meanwhile where GPUs are shared by MPS.

    Raises ValueError where the option says `mps` and MPS is unavailable.
    """
    option = config.launcher.gpu_sharing
    if option == "mps" and config.model.device == "cpu":
        raise ValueError("gpu_sharing 'mps' is for GPUs, but device is 'cpu'")
    if option == "timeslice" or config.model.device == "cpu" or (option == "auto" and not driver.exists()):
        yield dict(environment)
        return
    try:
        daemon = _Mps(run_dir / "mps", environment)
        daemon.start(_check(environment))
    except MpsUnavailable as reason:
        if option == "mps":
            raise ValueError(f"gpu_sharing 'mps': {reason} (python -m launcher.doctor says more)") from None
        logger.info("no MPS daemon is started: %s", reason)
        yield dict(environment)
        return
    logger.info("ViT and LLM share a GPU by MPS")
    try:
        yield daemon.environment
    finally:
        daemon.stop()


class _Mps:
    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._pipes, self._logs = folder, folder / "pipe", folder / "log"
        self.environment = {**environment, PIPES: str(self._pipes), LOGS: str(self._logs)}
        self._process: subprocess.Popen[bytes]

    def start(self, control: str) -> None:
        """Returns with a running daemon that has passed its probe. Raises MpsUnavailable."""
        # files of a killed launcher: this one holds the lock of the run directory
        shutil.rmtree(self._folder, ignore_errors=True)
        for path in (self._folder, self._pipes, self._logs):
            path.mkdir(mode=0o700)
        # A session of its own, so that Ctrl-C reaches the launcher only; killed if the launcher is killed.
        self._process = subprocess.Popen(
            [control, "-f"], env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=partial(end_with_parent, signal.SIGTERM),
        )  # fmt: skip
        try:
            self._wait(self._pipes / "control")
            self._probe()
        except BaseException:
            self.stop()
            raise

    def _wait(self, socket: Path) -> None:
        end = time.monotonic() + PROBE_TIMEOUT_S
        while not socket.exists():
            if self._process.poll() is not None:
                raise MpsUnavailable(f"{CONTROL} ended at once, with code {self._process.returncode}")
            if time.monotonic() > end:
                raise MpsUnavailable(f"{CONTROL} did not listen within {PROBE_TIMEOUT_S:.0f} s")
            time.sleep(0.05)

    def _probe(self) -> None:
        """A client of the daemon computes something small."""
        try:
            done = subprocess.run(
                [sys.executable, "-c", PROBE],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=PROBE_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            raise MpsUnavailable(f"a probe under MPS did not end within {PROBE_TIMEOUT_S:.0f} s") from None
        if done.returncode:
            raise MpsUnavailable(
                f"a probe under MPS failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}"
            )

    def stop(self) -> None:
        """Asks the daemon to end, which ends its servers too; kills it if it does not."""
        if self._process.poll() is None:
            try:
                subprocess.run(
                    [CONTROL],
                    input="quit\n",
                    env=self.environment,
                    capture_output=True,
                    text=True,
                    timeout=STOP_TIMEOUT_S,
                )
                self._process.wait(STOP_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired):
                logger.warning("the MPS daemon does not stop: killed")
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _check(environment: Mapping[str, str]) -> str:
    """The control program. Raises MpsUnavailable where no daemon should be started."""
    control = shutil.which(CONTROL, path=environment.get("PATH"))
    if control is None:
        raise MpsUnavailable(f"{CONTROL} is not installed")
    if PIPES in environment:
        raise MpsUnavailable(f"{PIPES} is set: the workers use that daemon")
    try:
        fields = "compute_mode,mig.mode.current"
        query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        found = subprocess.run(
            query, env=dict(environment), capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise MpsUnavailable(f"nvidia-smi does not tell how the GPUs are set: {error}") from None
    for line in found.splitlines():
        mode, mig = (part.strip() for part in line.split(","))
        if mode != "Default":
            raise MpsUnavailable(f"a GPU is in compute mode {mode}")
        if mig == "Enabled":
            raise MpsUnavailable("a GPU is divided by MIG")
    return control
