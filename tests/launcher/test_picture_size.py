"""How large pictures are seen where nobody says it."""

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
from pipeline.config import Config, ModelConfig, PreprocessConfig, VitConfig
from tests.pipeline.families.configs import QWEN3_VL, read

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
    assert most(folder, small, {}, absent) == LIMIT + 1, "no less than the least"


@pytest.mark.parametrize(
    ("pool_mib", "dtype", "on_gpu", "num_tokens"),
    [
        (256, "auto", True, 3276),  # 64 MiB of rows of 4 · 2560 numbers of 16 bits
        (256, "float32", True, 1638),
        (1024, "auto", True, 13107),
        (2048, "auto", True, None),  # the model's own
        (0, "auto", True, None),  # it grows with the pictures
        (256, "auto", False, 1280),
        (128, "auto", False, 819),
        (128, "bfloat16", False, 1280),
        (2, "auto", False, 64),  # the least that the model sees
    ],
)
def test_a_picture_takes_at_most_a_quarter_of_the_pool(
    pool_mib: int, dtype: str, on_gpu: bool, num_tokens: int | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    read(tmp_path, QWEN3_VL)
    config = Config(model=ModelConfig(dtype=dtype), vit=VitConfig(embedding_pool_mib=pool_mib))
    with caplog.at_level(logging.INFO):
        found = most(tmp_path, config, {}, tmp_path if on_gpu else tmp_path / "absent")
    assert found == (None if num_tokens is None else num_tokens * 32 * 32)
    assert (f"({num_tokens} tokens)" in caplog.text) == (num_tokens is not None)


def test_a_model_that_allows_less_keeps_its_own() -> None:
    assert most(EMBEDDED / "model", Config(), {}, Path("/absent")) is None
