"""What is said of a checkpoint's weights before any process starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoints import find_model
from launcher.cli import main
from launcher.stored_weights import check_files, check_weights
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


@pytest.mark.parametrize(
    ("method", "made", "of_tower", "words"),
    [
        ("", "none", None, "'int8' is for weights that are quantised, and those of this model are not"),
        ("", "fp8", None, "'int8' is for weights that are whole numbers"),
        ("", "int8", "fp8", "'int8' is for weights that are whole numbers"),
        ("fp8", "none", None, "'int8' is for weights that are whole numbers"),
        ("", "int8", "none", ""),
        ("", "none", "int4", ""),
        ("awq", "none", None, ""),
    ],
)
def test_activations_need_weights_that_they_go_with(
    method: str, made: str, of_tower: str | None, words: str, tmp_path: Path
) -> None:
    folder = quantised(tmp_path, method) if method else tmp_path
    llm = LlmConfig(quantization=made, activation_quantization="int8")
    config = Config(llm=llm, vit=VitConfig(vit_quantization=of_tower))
    if not words:
        check_weights(config, folder)
        return
    with pytest.raises(ValueError, match=f"activation_quantization {words}"):
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


def test_files_that_are_not_whole_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model-1.safetensors"
    save_file({"a": torch.ones(8), "b": torch.ones(4)}, path)
    check_files(tmp_path)
    whole = path.read_bytes()
    for content, words in (
        (
            whole[:-4],
            rf"model-1\.safetensors has {len(whole) - 4} bytes, by its header {len(whole)}: fetch it",
        ),
        (whole[:20], r"model-1\.safetensors is no file of safetensors"),
        (b"", r"model-1\.safetensors is no file of safetensors"),
        (
            b"\x02" + bytes(7) + b"[]" + bytes(20),
            r"model-1\.safetensors is no file of safetensors: fetch it",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            check_files(tmp_path)
    path.write_bytes(whole)
    places = {name: f"model-{name}.safetensors" for name in ("1", "2", "3")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(
        ValueError, match=r"lacks model-2\.safetensors and 1 others, which .* names: fetch it"
    ):
        check_files(tmp_path)


def test_gguf_is_refused_with_the_file_to_take(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model-Q4_K_M.gguf", "somebody/model.gguf"):
        with pytest.raises(ValueError, match=r"is in GGUF, .* same model in safetensors"):
            find_model(ModelConfig(model=str(name)))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert find_model(ModelConfig(model=str(tmp_path))).folder == tmp_path
