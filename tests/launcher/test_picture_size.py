"""How large pictures are seen without a GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest

from launcher.checkpoints import EMBEDDED
from launcher.picture_size import CPU_TOKENS, limit_pictures
from pipeline.config import Config, ModelConfig, PreprocessConfig

LIMIT = CPU_TOKENS * 28 * 28


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that allows what Qwen2-VL's own do."""
    for file in (EMBEDDED / "model").glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"] |= {"patch_size": 14, "spatial_merge_size": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056}))
    return tmp_path


def most(folder: Path, config: Config, environment: dict[str, str], driver: Path) -> int | None:
    return limit_pictures(config, folder, environment, [driver]).preprocess.max_pixels


def test_a_cpu_sees_1280_tokens_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    absent, present = folder / "absent", folder
    with caplog.at_level(logging.INFO):
        assert most(folder, Config(), {}, absent) == LIMIT
    assert "--max-pixels" in caplog.text
    assert most(folder, Config(), {"CUDA_VISIBLE_DEVICES": ""}, present) == LIMIT, "the GPUs are hidden"
    assert most(folder, Config(model=ModelConfig(device="cpu")), {}, present) == LIMIT


def test_a_gpu_and_whoever_chose_have_what_they_want(folder: Path) -> None:
    absent, present = folder / "absent", folder
    assert most(folder, Config(), {}, present) is None
    assert most(folder, Config(model=ModelConfig(device="cuda")), {}, absent) is None
    chosen = Config(preprocess=PreprocessConfig(max_pixels=12845056))
    assert most(folder, chosen, {}, absent) == 12845056
    small = dataclasses.replace(chosen, preprocess=PreprocessConfig(min_pixels=LIMIT + 1))
    assert most(folder, small, {}, absent) is None, "it would be below the least"


def test_a_model_that_allows_less_keeps_its_own() -> None:
    assert most(EMBEDDED / "model", Config(), {}, Path("/absent")) is None
