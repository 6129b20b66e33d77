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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
