from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.servers import Server

# the tests must not spin on cores that the servers under test need
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; Triton reads it when it is imported
is_nice = False
MANY_FILES = 300


@pytest.fixture
def short_path() -> Iterator[Path]:
    """An empty folder whose path leaves room for a socket's name, which pytest's own need not."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module", autouse=True)
def files_are_closed() -> Iterator[None]:
    """Engines of a module hold memory by descriptors, and references to themselves."""
    yield
    if len(os.listdir("/proc/self/fd")) > MANY_FILES:
        gc.collect()
        if not gc.get_freeze_count():
            gc.freeze()  # mostly modules, which take a second or more to look through


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="session")
def embedded_server(media_folder: Path) -> Iterator[Server]:
    """The embedded model, with local media allowed; in float32, so that answers do not depend on what else is
    computed with them. No test stops it or kills its workers."""
    from tests.integration.conftest import LIMITS
    from tests.servers import Server

    media = ("--allowed-local-media-path", str(media_folder), "--allow-private-media")
    with Server("--dtype", "float32", *media, *LIMITS) as running:
        yield running


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures that tests report and do not demand."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(
                f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}"
            )


def _steps_back(nodeid: str) -> bool:
    """Whether it has no real processes, and demands nothing of how long the event loop stands still."""
    return not nodeid.startswith(
        ("tests/integration/", "tests/clients/", "tests/page/", "tests/workers/api/test_server.py")
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One worker of pytest-xdist runs all tests with real processes, which look for what is left of them on
    the machine; else a file is run by one worker. (Its groups by marker do nothing with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0] if _steps_back(nodeid) else "real processes"

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside tests with real processes, many of which are about time, the others step back."""
    global is_nice
    if hasattr(item.config, "workerinput") and not is_nice and _steps_back(item.nodeid):
        is_nice = True
        os.nice(10)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _steps_back(item.nodeid))  # they take longest
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(
                    pytest.mark.skip(reason="kernels are compiled here: the tests marked gpu run them")
                )
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no GPU here"))
