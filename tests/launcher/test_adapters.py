"""Adapters are compared with the model before any worker starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.adapters import check_adapters
from launcher.checkpoints import EMBEDDED
from launcher.cli import main, parse
from pipeline.adapters.settings import SETTINGS
from pipeline.config import Config, ModelConfig, VitConfig
from tests.adapters import is_of_text
from tools.random_checkpoint.lora import write_adapter

MODEL = EMBEDDED / "model"


def config_of(folder: Path, vit_engine: str = "auto") -> Config:
    return Config(model=ModelConfig(lora=(f"mine={folder}",)), vit=VitConfig(vit_engine=vit_engine))


def test_options_add_up() -> None:
    several = parse(["--lora", "a=x", "--lora", "b=y", "c=z", "--lora", "d=w=v"])
    assert several.model.lora == ("a=x", "b=y", "c=z", "d=w=v")
    assert several.model.adapter_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "folder"], "lora takes NAME=FOLDER, not 'folder'"),
        (["--lora", "=folder"], "lora takes NAME=FOLDER, not '=folder'"),
        (["--lora", "name="], "lora takes NAME=FOLDER, not 'name='"),
        (["--lora", "a=x", "--lora", "a=y"], "an adapter 'a', which is also the name of another adapter"),
        (["--lora", "a=x", "--served-model-name", "m", "a"], "an adapter 'a', which is also the name of the"),
    ],
)
def test_names(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(options)
    assert message in capsys.readouterr().err


def test_folders_are_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(MODEL, tmp_path / "adapter", 2)
    monkeypatch.chdir(tmp_path)
    assert check_adapters(config_of(Path("adapter")), MODEL).model.lora == (f"mine={tmp_path / 'adapter'}",)
    assert check_adapters(Config(), MODEL) == Config()


@pytest.mark.parametrize("engine", ["onnxruntime", "tensorrt"])
def test_an_engine_without_adapters(engine: str, tmp_path: Path) -> None:
    whole = write_adapter(MODEL, tmp_path / "whole", 2)
    with pytest.raises(ValueError, match=r"adapter 'mine' changes the ViT, .*take --vit-engine torch"):
        check_adapters(config_of(whole, engine), MODEL)
    of_text = write_adapter(MODEL, tmp_path / "of-text", 2, is_target=is_of_text)
    check_adapters(config_of(of_text, engine), MODEL)


def test_the_start_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_adapter(MODEL, tmp_path / "dora", 2)
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps({**settings, "use_dora": True}))
    assert main(["--lora", f"mine={folder}", "--port", "0"]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("E ")]
    assert f"adapter 'mine' in '{folder}': use_dora is True: DoRA also scales" in line


def test_a_name_that_the_model_gets_by_its_folder(tmp_path: Path) -> None:
    config = ModelConfig(lora=("model=x",))
    with pytest.raises(ValueError, match="an adapter 'model', which is also the name of the model"):
        dataclasses.replace(config, served_model_name=("model",))
