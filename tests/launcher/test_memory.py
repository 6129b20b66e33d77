"""Whoever has too little memory is told before workers are killed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from launcher.memory import GIB, warn_of_memory
from pipeline.config import Config, LlmConfig, ModelConfig


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(7 * GIB)  # a hole: it takes no room
    return tmp_path


def warning(folder: Path, config: Config, gib: float, log: pytest.LogCaptureFixture, driver: Path) -> str:
    log.clear()
    with log.at_level(logging.WARNING):
        warn_of_memory(config, folder, int(gib * GIB), [driver])
    return log.text


def test_weights_that_leave_no_room_are_told_with_a_remedy(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    absent, present = folder / "absent", folder
    told = warning(folder, Config(), 7.9, caplog, absent)
    assert "7.0 GiB" in told
    assert "--quantization int8" in told
    assert not warning(folder, Config(), 8.1, caplog, absent)
    assert not warning(folder, Config(llm=LlmConfig(quantization="int8")), 7.9, caplog, absent)
    assert not warning(folder, Config(), 7.9, caplog, present), "weights are in the GPU's memory"
    assert warning(folder, Config(model=ModelConfig(device="cpu")), 7.9, caplog, present)


def test_quantised_weights_have_another_remedy(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq"}}))
    told = warning(folder, Config(), 7.9, caplog, folder / "absent")
    assert "7.0 GiB" in told
    assert "files of fewer bits" in told
    assert "--quantization" not in told
