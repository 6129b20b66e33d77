"""What is said of a checkpoint's weights before any process starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.checkpoints import find_model
from launcher.cli import main
from launcher.stored_weights import check_weights
from pipeline.config import Config, LlmConfig, ModelConfig, VitConfig
from pipeline.process import log


def quantised(folder: Path, method: str = "awq", **settings: object) -> Path:
    config = {"quantization_config": {"quant_method": method, **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def test_weights_are_not_quantised_twice(tmp_path: Path) -> None:
    folder = quantised(tmp_path)
    check_weights(Config(), folder)
    check_weights(Config(vit=VitConfig(vit_quantization="none")), folder)
    for config in (
        Config(llm=LlmConfig(quantization="int8")),
        Config(vit=VitConfig(vit_quantization="int4")),
    ):
        with pytest.raises(
            ValueError, match=r"is for dense weights, but .* by 'awq' already .*: leave the option"
        ):
            check_weights(config, folder)


def test_the_launcher_says_it_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "configure", lambda *arguments: None)
    folder = quantised(tmp_path, "bitsandbytes", load_in_4bit=True)
    assert main(["--model", str(folder), "--port", "0"]) == 1
    (record,) = (record for record in caplog.records if record.levelname == "ERROR")
    assert "'bitsandbytes'" in record.message
    assert "\n" not in record.message


def test_gguf_is_refused_with_the_file_to_take(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model-Q4_K_M.gguf", "somebody/model.gguf"):
        with pytest.raises(ValueError, match=r"is in GGUF, .* same model in safetensors"):
            find_model(ModelConfig(model=str(name)))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert find_model(ModelConfig(model=str(tmp_path))).folder == tmp_path
