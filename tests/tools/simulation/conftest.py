from __future__ import annotations

import pytest

from launcher.checkpoints import EMBEDDED
from pipeline.families import ModelInfo, read_model_info


@pytest.fixture(scope="session")
def info() -> ModelInfo:
    return read_model_info(EMBEDDED / "model", None, 448 * 448)
