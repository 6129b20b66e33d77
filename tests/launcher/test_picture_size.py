"""How large pictures are seen without a GPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from launcher.checkpoints import EMBEDDED
from launcher.picture_size import CPU_TOKENS, limit_pictures, torch_has_cuda
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
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 3136, "max_pixels": 12845056})
    )
    return tmp_path


def most(
    folder: Path, config: Config, environment: dict[str, str], driver: Path, has_cuda: bool = True
) -> int | None:
    return limit_pictures(config, folder, environment, [driver], lambda _: has_cuda).preprocess.max_pixels


def test_a_cpu_sees_1280_tokens_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    absent, present = folder / "absent", folder
    with caplog.at_level(logging.INFO):
        assert most(folder, Config(), {}, absent) == LIMIT
    assert "--max-pixels" in caplog.text
    assert most(folder, Config(), {"CUDA_VISIBLE_DEVICES": ""}, present) == LIMIT, "the GPUs are hidden"
    assert most(folder, Config(model=ModelConfig(device="cpu")), {}, present) == LIMIT


def test_a_gpu_that_torch_cannot_use_is_none(folder: Path) -> None:
    """A driver is there, but torch was built without CUDA, or for a newer one."""
    assert most(folder, Config(), {}, folder, has_cuda=False) == LIMIT
    assert most(folder, Config(model=ModelConfig(device="cuda")), {}, folder, has_cuda=False) is None


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    assert not torch_has_cuda(hidden)
    assert torch_has_cuda(dict(os.environ)) == torch.cuda.is_available()


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
