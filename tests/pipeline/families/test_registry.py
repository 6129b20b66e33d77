from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import pipeline.families
from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info
from pipeline.families.registry import families

TOY = """
from pipeline.families.qwen2_vl import Qwen2VL


class Toy(Qwen2VL):
    model_type = "toy"


FAMILIES = (Toy(),)
"""


def write_config(folder: Path, **changes: object) -> Path:
    model = EMBEDDED / "model"
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    shutil.copy(model / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_model_info(tmp_path)


def test_an_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="family 'llama'; served are qwen2_vl"):
        read_model_info(write_config(tmp_path, model_type="llama"))


def test_a_family_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tmp_path / "house"
    house.mkdir()
    (house / "toy_family.py").write_text(TOY)
    monkeypatch.setattr(pipeline.families, "__path__", [*pipeline.families.__path__, str(house)])
    families.cache_clear()
    try:
        info = read_model_info(write_config(tmp_path, model_type="toy"))
        assert info.family.model_type == "toy"
    finally:
        families.cache_clear()
