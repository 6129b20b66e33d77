"""The fork server with a real worker, preprocess, which needs nobody else to be ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from launcher.environment import workers_environment
from pipeline.config import Config
from pipeline.process.fork_server import ForkServer, WorkerProcess
from pipeline.process.process import Placement, WorkerSpec
from pipeline.transport.poller import Poller
from pipeline.transport.sockets import Sockets
from pipeline.wire.control import PipelineState, WorkerFailed, WorkerReady
from pipeline.wire.topology import CONTROL, STATUS, Role, WorkerId
from tests.servers import is_alive

ENVIRONMENT = workers_environment(os.environ, Path.home(), Path("/"))
PREPROCESS = WorkerId(Role.PREPROCESS)
OTHERS = (PREPROCESS, WorkerId(Role.VIT), WorkerId(Role.LLM))


class Pipeline:
    """A run directory, and the launcher's ends of it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.server = ForkServer(ENVIRONMENT)
        self.server.start()
        self.sockets = Sockets(run_dir, {PREPROCESS: 1})
        self.status, self.control = self.sockets.receiver(STATUS), self.sockets.publisher(CONTROL)

    def start(self, model: Path = EMBEDDED / "model") -> WorkerProcess:
        return self.server.fork(
            WorkerSpec(
                worker=PREPROCESS, epochs={str(worker): 1 for worker in OTHERS}, run_dir=str(self._run_dir),
                model_folder=str(model),
                placement=Placement(cores=(0,), num_threads=1), config=Config(),
            )
        )  # fmt: skip

    def wait_for(self, kind: type) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            while (received := self.status.receive()) is not None:
                if isinstance(received.message, kind):
                    return
            Poller(self.status).wait(0.1)
        raise AssertionError(f"no {kind.__name__} came")


def shown_by_ps(pid: int) -> tuple[str, str]:
    """The command's name, and the command line."""
    name, line = (Path(f"/proc/{pid}/{file}").read_text() for file in ("comm", "cmdline"))
    return name.strip(), line.rstrip("\0")


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    made = Pipeline(tmp_path)
    yield made
    made.server.close()
    made.sockets.close()


def test_a_worker_starts_again_and_again_and_ends_as_it_should(pipeline: Pipeline) -> None:
    first = pipeline.start()
    pipeline.wait_for(WorkerReady)
    assert not first.wait(0.01)
    assert first.pid is not None
    assert shown_by_ps(first.pid) == ("preprocess.0", "vlm preprocess.0")
    first.kill()
    assert first.wait(10)
    assert first.exit_code == -signal.SIGKILL
    second = pipeline.start()
    pipeline.wait_for(WorkerReady)
    for _ in range(100):
        pipeline.control.subscriptions()  # once it is there
        pipeline.control.publish(PipelineState(workers=(), end=""))
        if second.wait(0.1):
            break
    assert second.exit_code == 0


def test_a_worker_that_fails_says_why_and_the_server_goes_on(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    failing = pipeline.start(tmp_path / "empty")
    pipeline.wait_for(WorkerFailed)
    assert failing.wait(10)
    assert failing.exit_code == 1
    pipeline.start()
    pipeline.wait_for(WorkerReady)


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_with_the_server_every_worker_ends(end: str, pipeline: Pipeline) -> None:
    worker = pipeline.start()
    pipeline.wait_for(WorkerReady)
    pipeline.server.read()
    assert worker.pid is not None
    if end == "closed":
        pipeline.server.close()
    else:
        pipeline.server._server.kill()
        assert worker.wait(10)
        assert pipeline.server.is_dead
    for _ in range(200):
        if not is_alive(worker.pid):
            return
        time.sleep(0.01)
    raise AssertionError("the worker lives on")


def test_a_launcher_that_goes_before_it_has_read_leaves_nothing(pipeline: Pipeline) -> None:
    """Its end of the socket then breaks instead of ending."""
    pipeline.start()
    pipeline.wait_for(WorkerReady)
    server = pipeline.server._server.pid
    (worker,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    pipeline.server.close()
    assert pipeline.server._server.returncode == 0
    assert not is_alive(int(worker)), "it is reaped before the server ends"


def test_who_is_killed_before_its_turn_never_starts(pipeline: Pipeline) -> None:
    started = [pipeline.start() for _ in range(3)]
    started[2].kill()
    assert started[2].wait(30)
    assert started[2].exit_code == -signal.SIGKILL
    pipeline.wait_for(WorkerReady)


def test_what_the_workers_import_starts_no_thread() -> None:
    """A fork has only the thread that forks; what others hold at that moment nobody ever gives back."""
    code = (
        "import os\n"
        + "".join(f"import workers.{role}.worker\n" for role in ("api", "preprocess", "vit", "llm"))
        + "print(len(os.listdir('/proc/self/task')))"
    )
    done = subprocess.check_output([sys.executable, "-c", code], env=ENVIRONMENT, text=True)
    assert done.strip() == "1"
