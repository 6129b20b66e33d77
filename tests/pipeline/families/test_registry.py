from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline.families
from launcher.checkpoints import EMBEDDED
from pipeline.families import read_model_info, registry
from pipeline.families.registry import GROUP

SERVED = "qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_5_moe, qwen3_vl, qwen3_vl_moe"
TOY = """
from pipeline.families.qwen2_vl import Qwen2VL


class Toy(Qwen2VL):
    model_type = "toy"


FAMILIES = (Toy(),)
"""


@pytest.fixture(autouse=True)
def fresh_lookups() -> Iterator[None]:
    """A process looks once; each test is a process of its own."""

    def forget() -> None:
        for lookup in (registry.families, registry._entry_points, registry.find_family):
            lookup.cache_clear()
        sys.modules.pop("toy_package", None)
        importlib.invalidate_caches()

    forget()
    yield
    forget()


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
    with pytest.raises(ValueError, match=f"family 'llama'; served are {SERVED}$"):
        read_model_info(write_config(tmp_path, model_type="llama"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen2_5_omni", "no audio is served"),
        ("qwen3_omni_moe", "no audio is served"),
        ("qwen4_exp", "sparse attention are not served"),
        ("colqwen2", "it makes embeddings for retrieval and writes no text"),
    ],
)
def test_a_relative_is_refused_with_what_is_not_served(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"family '{name}': .*{why}; served are {SERVED}$"):
        read_model_info(write_config(tmp_path, model_type=name))


def test_a_family_is_added_by_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tmp_path / "house"
    house.mkdir()
    (house / "toy_family.py").write_text(TOY)
    monkeypatch.setattr(pipeline.families, "__path__", [*pipeline.families.__path__, str(house)])
    info = read_model_info(write_config(tmp_path, model_type="toy"))
    assert info.family.model_type == "toy"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """A package with entry points, as pip leaves it behind."""
    (folder / "toy_package.py").write_text(TOY)
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join((f"[{GROUP}]", *lines)))
    monkeypatch.syspath_prepend(folder)


def test_another_package_adds_a_family_by_an_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    install(tmp_path, monkeypatch, "toy = toy_package:Toy")
    assert read_model_info(write_config(tmp_path, model_type="toy")).family.model_type == "toy"
    with pytest.raises(ValueError, match=f"served are {SERVED}, toy$"):
        read_model_info(write_config(tmp_path, model_type="llama"))


def test_no_package_takes_the_place_of_one_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "qwen2_vl = toy_package:Toy")
    assert type(read_model_info(write_config(tmp_path)).family).__name__ == "Qwen2VL"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("toy = no_such_package:Toy", "cannot be imported: No module named 'no_such_package'"),
        ("toy = toy_package:Other", "cannot be imported: .*'Other'"),
        ("toy = toy_package:FAMILIES", "must name a Family with the model_type 'toy'"),
        ("other = toy_package:Toy", "must name a Family with the model_type 'other'"),
    ],
)
def test_an_entry_point_that_is_no_family_is_refused_by_name(
    line: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, line)
    with pytest.raises(ValueError, match=f"entry point .*{what}"):
        read_model_info(write_config(tmp_path, model_type=line.split()[0]))
