from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

# the tests must not spin on cores that the servers under test need
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels then run on the CPU; Triton reads it when it is imported
is_nice = False


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Figures that tests report and do not demand."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(
                f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}"
            )


def _needs_real_processes(item: pytest.Item) -> bool:
    return item.nodeid.startswith(("tests/integration/", "tests/clients/"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside tests with real processes, many of which are about time, the others step back."""
    global is_nice
    if hasattr(item.config, "workerinput") and not is_nice and not _needs_real_processes(item):
        is_nice = True
        os.nice(10)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist: one worker runs those with real processes, and first
        items.sort(key=_needs_real_processes, reverse=True)
        for item in items:
            if _needs_real_processes(item):
                item.add_marker(pytest.mark.xdist_group("processes"))
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
